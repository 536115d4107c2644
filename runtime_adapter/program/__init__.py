"""What is known of a program before it runs: analysis, names, signature, and what is wrong."""
