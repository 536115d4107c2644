"""Rows: the only room that speaks SQL, SQLAlchemy and Alembic."""
