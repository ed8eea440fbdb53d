//! Owns the results database: runs and their raw request rows in SQLite.

use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::Value;
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqliteSynchronous};
use sqlx::types::Json;
use sqlx::{ConnectOptions, Connection, SqliteConnection};

use crate::environment::Environment;
use crate::record::RequestRecord;
use crate::{Error, Result};

/// An open results database.
pub struct Store {
    path: PathBuf,
    connection: SqliteConnection,
}

/// One run as stored.
#[derive(Debug, Clone, PartialEq)]
pub struct Run {
    /// Given by the database.
    pub id: i64,
    pub name: String,
    pub model: Option<String>,
    pub api: String,
    pub url: String,
    pub dataset: String,
    pub dataset_path: Option<String>,
    pub synthetic: bool,
    /// Requests that were to be sent.
    pub number: i64,
    pub parallel: Option<i64>,
    pub rate: Option<f64>,
    pub config: Value,
    pub environment: Environment,
    /// Seconds since 1970-01-01 UTC.
    pub started_at: f64,
    pub ended_at: Option<f64>,
    pub interrupted: bool,
}

impl Store {
    /// Opens the database at `path` and makes it, or brings it to this version's tables, if need be.
    pub async fn open_or_create(path: &Path) -> Result<Self> {
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
        }
        Self::connect(path, SqliteConnectOptions::new().create_if_missing(true)).await
    }

    /// Opens the database at `path`, which must exist.
    pub async fn open(path: &Path) -> Result<Self> {
        if !path.is_file() {
            return Err(Error::NoRun { path: path.to_owned(), message: "no such file".into() });
        }
        Self::connect(path, SqliteConnectOptions::new()).await
    }

    async fn connect(path: &Path, options: SqliteConnectOptions) -> Result<Self> {
        let database_error = |source| Error::Database { path: path.to_owned(), source };
        // WAL: a commit does not wait for the disk, so recording does not disturb the load.
        let options =
            options.filename(path).journal_mode(SqliteJournalMode::Wal).synchronous(SqliteSynchronous::Normal);
        let mut connection = options.connect().await.map_err(database_error)?;
        let migrated = sqlx::migrate!().run(&mut connection).await;
        migrated.map_err(|error| database_error(error.into()))?;
        Ok(Self { path: path.to_owned(), connection })
    }

    fn error(path: &Path) -> impl Fn(sqlx::Error) -> Error + use<> {
        let path = path.to_owned();
        move |source| Error::Database { path: path.clone(), source }
    }

    /// Adds a run and gives back its id; `run.id` is not looked at.
    pub async fn insert_run(&mut self, run: &Run) -> Result<i64> {
        let (environment, config) = (&run.environment, run.config.to_string());
        let done = sqlx::query!(
            "INSERT INTO runs (name, model, api, url, dataset, dataset_path, synthetic, number, parallel, rate, config,
             version, host, cpu, gpu, started_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            run.name,
            run.model,
            run.api,
            run.url,
            run.dataset,
            run.dataset_path,
            run.synthetic,
            run.number,
            run.parallel,
            run.rate,
            config,
            environment.version,
            environment.host,
            environment.cpu,
            environment.gpu,
            run.started_at,
        )
        .execute(&mut self.connection)
        .await;
        Ok(done.map_err(Self::error(&self.path))?.last_insert_rowid())
    }

    /// Marks a run as over.
    pub async fn end_run(&mut self, run_id: i64, interrupted: bool) -> Result<()> {
        let ended_at = epoch_s();
        sqlx::query!("UPDATE runs SET ended_at = ?, interrupted = ? WHERE id = ?", ended_at, interrupted, run_id)
            .execute(&mut self.connection)
            .await
            .map_err(Self::error(&self.path))?;
        Ok(())
    }

    /// Adds request rows in one transaction.
    pub async fn insert_requests(&mut self, run_id: i64, records: &[RequestRecord]) -> Result<()> {
        let database_error = Self::error(&self.path);
        let mut transaction = self.connection.begin().await.map_err(&database_error)?;
        for record in records {
            let token_offsets_us = Json(&record.token_offsets_us);
            sqlx::query!(
                "INSERT INTO requests (run_id, request, response, success, error, http_status, finish_reason,
                 prompt_tokens, completion_tokens, cached_tokens, streamed, intended_s, sent_s, first_message_s,
                 first_choices_s, first_token_s, penultimate_message_s, end_s, n_messages, token_offsets_us)
                 VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                run_id,
                record.request,
                record.response,
                record.success,
                record.error,
                record.http_status,
                record.finish_reason,
                record.prompt_tokens,
                record.completion_tokens,
                record.cached_tokens,
                record.streamed,
                record.intended_s,
                record.sent_s,
                record.first_message_s,
                record.first_choices_s,
                record.first_token_s,
                record.penultimate_message_s,
                record.end_s,
                record.n_messages,
                token_offsets_us,
            )
            .execute(&mut *transaction)
            .await
            .map_err(&database_error)?;
        }
        transaction.commit().await.map_err(&database_error)
    }

    /// All runs, or the one with this id, oldest first.
    ///
    /// # Errors
    /// If there is none.
    pub async fn runs(&mut self, run_id: Option<i64>) -> Result<Vec<Run>> {
        let rows = sqlx::query!(
            r#"SELECT id, name, model, api, url, dataset, dataset_path, synthetic AS "synthetic: bool", number, parallel,
               rate, config, version, host, cpu, gpu, started_at, ended_at, interrupted AS "interrupted: bool"
               FROM runs WHERE ?1 IS NULL OR id = ?1 ORDER BY id"#,
            run_id
        )
        .fetch_all(&mut self.connection)
        .await
        .map_err(Self::error(&self.path))?;
        if rows.is_empty() {
            let message = match run_id {
                Some(run_id) => format!("no run {run_id}; leave --run out to see all"),
                None => "has no runs".into(),
            };
            return Err(Error::NoRun { path: self.path.clone(), message });
        }
        let runs = rows.into_iter().map(|row| Run {
            id: row.id,
            name: row.name,
            model: row.model,
            api: row.api,
            url: row.url,
            dataset: row.dataset,
            dataset_path: row.dataset_path,
            synthetic: row.synthetic,
            number: row.number,
            parallel: row.parallel,
            rate: row.rate,
            config: serde_json::from_str(&row.config).unwrap_or_default(),
            environment: Environment { version: row.version, host: row.host, cpu: row.cpu, gpu: row.gpu },
            started_at: row.started_at,
            ended_at: row.ended_at,
            interrupted: row.interrupted,
        });
        Ok(runs.collect())
    }

    /// The rows of a run in order of recording, without the texts of request and response.
    pub async fn requests(&mut self, run_id: i64) -> Result<Vec<RequestRecord>> {
        let rows = sqlx::query!(
            r#"SELECT success AS "success: bool", error, http_status, finish_reason, prompt_tokens, completion_tokens,
               cached_tokens, streamed AS "streamed: bool", intended_s, sent_s, first_message_s, first_choices_s,
               first_token_s, penultimate_message_s, end_s, n_messages,
               token_offsets_us AS "token_offsets_us: Json<Vec<u64>>"
               FROM requests WHERE run_id = ? ORDER BY id"#,
            run_id
        )
        .fetch_all(&mut self.connection)
        .await
        .map_err(Self::error(&self.path))?;
        let records = rows.into_iter().map(|row| RequestRecord {
            request: String::new(),
            response: String::new(),
            success: row.success,
            error: row.error,
            http_status: row.http_status,
            finish_reason: row.finish_reason,
            prompt_tokens: row.prompt_tokens,
            completion_tokens: row.completion_tokens,
            cached_tokens: row.cached_tokens,
            streamed: row.streamed,
            intended_s: row.intended_s,
            sent_s: row.sent_s,
            first_message_s: row.first_message_s,
            first_choices_s: row.first_choices_s,
            first_token_s: row.first_token_s,
            penultimate_message_s: row.penultimate_message_s,
            end_s: row.end_s,
            n_messages: row.n_messages,
            token_offsets_us: row.token_offsets_us.0,
        });
        Ok(records.collect())
    }

    /// Closes the database; everything is in its one file afterwards.
    pub async fn close(self) -> Result<()> {
        self.connection.close().await.map_err(Self::error(&self.path))
    }
}

/// Now, in seconds since 1970-01-01 UTC.
pub fn epoch_s() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}
