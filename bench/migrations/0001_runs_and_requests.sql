-- One row per run: what was asked, where, and on what.
CREATE TABLE runs (
    id INTEGER PRIMARY KEY NOT NULL,
    name TEXT NOT NULL,
    model TEXT,
    api TEXT NOT NULL,
    url TEXT NOT NULL,
    dataset TEXT NOT NULL,
    dataset_path TEXT,
    synthetic BOOLEAN NOT NULL,
    number INTEGER NOT NULL,
    parallel INTEGER,            -- NULL: no limit
    rate REAL,                   -- NULL: closed loop
    config TEXT NOT NULL,        -- the whole configuration, JSON
    version TEXT NOT NULL,       -- of ember-bench
    host TEXT NOT NULL,
    cpu TEXT NOT NULL,
    gpu TEXT,
    started_at REAL NOT NULL,    -- seconds since 1970-01-01 UTC; zero of the requests' times
    ended_at REAL,               -- NULL: the run was cut off
    interrupted BOOLEAN NOT NULL DEFAULT FALSE
);

-- One row per request; times are seconds since the run's start.
CREATE TABLE requests (
    id INTEGER PRIMARY KEY NOT NULL,
    run_id INTEGER NOT NULL REFERENCES runs (id),
    request TEXT NOT NULL,       -- JSON
    response TEXT NOT NULL,
    success BOOLEAN NOT NULL,
    error TEXT,
    http_status INTEGER,
    finish_reason TEXT,
    prompt_tokens INTEGER,
    completion_tokens INTEGER,
    cached_tokens INTEGER,
    streamed BOOLEAN NOT NULL,
    intended_s REAL NOT NULL,
    sent_s REAL NOT NULL,
    first_message_s REAL,
    first_choices_s REAL,
    first_token_s REAL,
    penultimate_message_s REAL,
    end_s REAL NOT NULL,
    n_messages INTEGER NOT NULL,
    token_offsets_us TEXT NOT NULL -- JSON array, microseconds since sent_s
);
CREATE INDEX requests_run_id ON requests (run_id);
