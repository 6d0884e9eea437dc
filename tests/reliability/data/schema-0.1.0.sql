-- The schema of 0.1.0 as it made it, with a few rows.
CREATE TABLE attempts (
    id TEXT NOT NULL, 
    rollout_id TEXT NOT NULL, 
    number INTEGER NOT NULL, 
    worker_id TEXT NOT NULL, 
    status TEXT NOT NULL, 
    lease_expires_ns BIGINT NOT NULL, 
    deadline_ns BIGINT NOT NULL, 
    started_ns BIGINT NOT NULL, 
    ended_ns BIGINT, 
    error TEXT, 
    PRIMARY KEY (id)
);

CREATE UNIQUE INDEX attempts_by_rollout ON attempts (rollout_id, number);

CREATE INDEX attempts_running ON attempts (status, lease_expires_ns);

CREATE TABLE keys (
    hash TEXT NOT NULL, 
    scope TEXT NOT NULL, 
    rollout_id TEXT, 
    attempt_id TEXT, 
    created_ns BIGINT NOT NULL, 
    PRIMARY KEY (hash)
);

CREATE INDEX keys_by_attempt ON keys (attempt_id);

CREATE TABLE meta (
    "key" TEXT NOT NULL, 
    value TEXT NOT NULL, 
    PRIMARY KEY ("key")
);

CREATE TABLE rollouts (
    seq INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, 
    id TEXT NOT NULL, 
    run_id TEXT, 
    group_id TEXT NOT NULL, 
    mode TEXT NOT NULL, 
    status TEXT NOT NULL, 
    policy_version INTEGER, 
    task BLOB, 
    start_to_close_s FLOAT NOT NULL, 
    max_attempts INTEGER NOT NULL, 
    attempts INTEGER NOT NULL, 
    failures INTEGER NOT NULL, 
    available_ns BIGINT NOT NULL, 
    created_ns BIGINT NOT NULL, 
    ended_ns BIGINT, 
    UNIQUE (id)
);

CREATE INDEX rollouts_by_run ON rollouts (run_id, seq);

CREATE INDEX rollouts_by_status ON rollouts (status, seq);

CREATE TABLE runs (
    id TEXT NOT NULL, 
    state BLOB NOT NULL, 
    created_ns BIGINT NOT NULL, 
    updated_ns BIGINT NOT NULL, 
    PRIMARY KEY (id)
);

CREATE TABLE spans (
    seq INTEGER NOT NULL, 
    trace_id TEXT NOT NULL, 
    span_id TEXT NOT NULL, 
    parent_id TEXT, 
    rollout_id TEXT NOT NULL, 
    attempt_id TEXT NOT NULL, 
    name TEXT NOT NULL, 
    scope TEXT NOT NULL, 
    start_ns BIGINT NOT NULL, 
    end_ns BIGINT NOT NULL, 
    failed BOOLEAN NOT NULL, 
    head BLOB NOT NULL, 
    body BLOB NOT NULL, 
    PRIMARY KEY (seq)
);

CREATE INDEX spans_by_attempt ON spans (rollout_id, attempt_id, start_ns);

CREATE UNIQUE INDEX spans_by_id ON spans (trace_id, span_id);

INSERT INTO meta VALUES ('schema_version', '1');
INSERT INTO rollouts VALUES (1, 'r', 'run', 'g', 'train', 'succeeded', 3, '{"id":"t","input":{"q":1},"split":"train"}', 600.0, 3, 1, 0, 0, 5, 9);
INSERT INTO rollouts VALUES (2, 'waits', NULL, 'g', 'train', 'queued', NULL, NULL, 600.0, 3, 0, 0, 0, 6, NULL);
INSERT INTO attempts VALUES ('r-1', 'r', 1, 'w', 'succeeded', 1, 2, 3, 4, NULL);
INSERT INTO spans VALUES (1, '0000000000000000000000000000000a', '000000000000000b', NULL, 'r', 'r-1', 'work', '', 1, 2, 0, x'1200', x'0a100000000000000000000000000000000a1208000000000000000b2a04776f726b390100000000000000410200000000000000');
INSERT INTO keys VALUES ('8254c329a92850f6d539dd376f4816ee2764517da5e0235514af433164480d7a', 'runner', NULL, NULL, 7);
INSERT INTO runs VALUES ('run', '{"step":2}', 1, 2);
