-- Format version 3. FORMAT.md says what every column means.
CREATE TABLE format (
    id INTEGER NOT NULL PRIMARY KEY CHECK (id = 1),
    version INTEGER NOT NULL,
    min_reader INTEGER NOT NULL,
    min_writer INTEGER NOT NULL
);

CREATE TABLE models (
    id INTEGER NOT NULL PRIMARY KEY,
    fingerprint BLOB NOT NULL UNIQUE CHECK (length(fingerprint) = 32),
    weights_digest BLOB NOT NULL CHECK (length(weights_digest) = 32),
    program_digest BLOB NOT NULL CHECK (length(program_digest) = 32),
    layout_digest BLOB NOT NULL CHECK (length(layout_digest) = 32),
    manifest BLOB NOT NULL,
    created_at_ms INTEGER NOT NULL
);

CREATE TABLE spaces (
    id INTEGER NOT NULL PRIMARY KEY,
    model_id INTEGER NOT NULL REFERENCES models (id) ON DELETE RESTRICT,
    root_key BLOB NOT NULL UNIQUE CHECK (length(root_key) = 32),
    chunk_n_tokens INTEGER NOT NULL CHECK (chunk_n_tokens > 0),
    namespace TEXT NOT NULL,
    adapter BLOB NOT NULL
);

CREATE TABLE chunks (
    id INTEGER NOT NULL PRIMARY KEY,
    space_id INTEGER NOT NULL REFERENCES spaces (id) ON DELETE RESTRICT,
    parent_id INTEGER REFERENCES chunks (id) ON DELETE RESTRICT,
    base_id INTEGER REFERENCES chunks (id) ON DELETE RESTRICT,
    base_n_tokens INTEGER NOT NULL CHECK (base_n_tokens BETWEEN 0 AND stop - start),
    key BLOB NOT NULL UNIQUE CHECK (length(key) = 32),
    parent_key BLOB NOT NULL CHECK (length(parent_key) = 32),
    start INTEGER NOT NULL CHECK (start >= 0),
    stop INTEGER NOT NULL CHECK (stop > start),
    tokens BLOB NOT NULL CHECK (length(tokens) = 8 * (stop - start)),
    raw_nbytes INTEGER NOT NULL CHECK (raw_nbytes >= 0),
    stored_nbytes INTEGER NOT NULL CHECK (stored_nbytes >= 0),
    created_at_ms INTEGER NOT NULL,
    last_used_at_ms INTEGER NOT NULL,
    extras BLOB NOT NULL DEFAULT x'',
    CHECK ((base_id IS NULL) = (base_n_tokens = 0)),
    CHECK ((parent_id IS NULL) = (start = 0))
);

CREATE UNIQUE INDEX chunks_by_tokens ON chunks (parent_key, extras, tokens);

CREATE INDEX chunks_by_space ON chunks (space_id);

CREATE INDEX chunks_by_parent ON chunks (parent_id);

CREATE INDEX chunks_by_base ON chunks (base_id);

CREATE TABLE payloads (
    id INTEGER NOT NULL PRIMARY KEY,
    data BLOB NOT NULL
);

CREATE TABLE blobs (
    chunk_id INTEGER NOT NULL REFERENCES chunks (id) ON DELETE RESTRICT,
    tensor INTEGER NOT NULL CHECK (tensor >= 0),
    start INTEGER NOT NULL CHECK (start >= 0),
    stop INTEGER NOT NULL CHECK (stop > start),
    codec INTEGER NOT NULL,
    raw_nbytes INTEGER NOT NULL CHECK (raw_nbytes > 0),
    stored_nbytes INTEGER NOT NULL CHECK (stored_nbytes > 0),
    checksum BLOB NOT NULL CHECK (length(checksum) = 16),
    payload_id INTEGER NOT NULL UNIQUE REFERENCES payloads (id) ON DELETE RESTRICT,
    PRIMARY KEY (chunk_id, tensor, start)
) WITHOUT ROWID;

CREATE TABLE sessions (
    id INTEGER NOT NULL PRIMARY KEY,
    namespace TEXT NOT NULL,
    name TEXT NOT NULL CHECK (length(name) > 0),
    space_id INTEGER NOT NULL REFERENCES spaces (id) ON DELETE RESTRICT,
    head_id INTEGER REFERENCES chunks (id) ON DELETE RESTRICT,
    n_tokens INTEGER NOT NULL CHECK (n_tokens > 0),
    metadata BLOB NOT NULL,
    created_at_ms INTEGER NOT NULL,
    updated_at_ms INTEGER NOT NULL,
    UNIQUE (namespace, name)
);

CREATE INDEX sessions_by_space ON sessions (space_id);

CREATE INDEX sessions_by_head ON sessions (head_id);

CREATE TABLE session_tokens (
    session_id INTEGER NOT NULL REFERENCES sessions (id) ON DELETE RESTRICT,
    start INTEGER NOT NULL CHECK (start >= 0),
    tokens BLOB NOT NULL CHECK (length(tokens) > 0 AND length(tokens) % 8 = 0),
    PRIMARY KEY (session_id, start)
) WITHOUT ROWID;

CREATE TABLE leases (
    id INTEGER NOT NULL PRIMARY KEY,
    chunk_id INTEGER NOT NULL REFERENCES chunks (id) ON DELETE RESTRICT,
    expires_at_ms INTEGER NOT NULL
);

CREATE INDEX leases_by_chunk ON leases (chunk_id);

CREATE TABLE bases (
    id INTEGER NOT NULL PRIMARY KEY,
    space_id INTEGER NOT NULL REFERENCES spaces (id) ON DELETE RESTRICT,
    tensor INTEGER NOT NULL CHECK (tensor >= 0),
    digest BLOB NOT NULL CHECK (length(digest) = 16),
    data BLOB NOT NULL CHECK (length(data) > 0),
    UNIQUE (space_id, tensor)
);

CREATE TABLE alembic_version (
    version_num VARCHAR(32) NOT NULL,
    CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);
