//! Owns the `perf` command: loads the data, goes through the points of the sweep, records and reports them.

use std::sync::Arc;
use std::time::Instant;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::time::{Duration, MissedTickBehavior, interval};

use crate::cli::OutputArgs;
use crate::client::Client;
use crate::config::{Config, Point};
use crate::dataset::{self, Loaded, Sample};
use crate::environment::Environment;
use crate::load::Load;
use crate::progress::Progress;
use crate::record::RequestRecord;
use crate::report::{self, Report};
use crate::store::{Run, Store, epoch_s};
use crate::{Error, Result};

/// Requests of a point that says no number and has no file to go through.
const DEFAULT_NUMBER: usize = 1000;
/// Records on their way to the database; a full queue would hold the load back.
const RECORD_QUEUE: usize = 8192;

/// Runs every point and reports each as it ends.
///
/// # Errors
/// What ends a run before its requests are sent: data, address, database. Failed requests are results, not errors.
pub async fn command(config: Config) -> Result<Vec<Report>> {
    let config = Arc::new(config);
    let wanted = |point: &Point| point.number.unwrap_or(DEFAULT_NUMBER) + config.warmup;
    let Loaded { samples, path, synthetic } =
        dataset::load(config.dataset, config.points.iter().map(wanted).sum(), &config.data)?;
    let one_pass = path.is_some() && !synthetic;
    let mut sweep = Sweep {
        samples: Arc::new(samples),
        dataset_path: path.map(|path| path.display().to_string()),
        synthetic,
        offset: 0,
        environment: Environment::detect(),
        store: Store::open_or_create(&config.db).await?,
        config: Arc::clone(&config),
    };
    sweep.check().await?;
    let mut reports: Vec<Report> = Vec::new();
    for point in &config.points {
        let n_requests = point.number.unwrap_or(if one_pass { sweep.samples.len() } else { DEFAULT_NUMBER });
        let report = sweep.point(*point, n_requests).await?;
        println!("{}", report::console(&report));
        let interrupted = report.summary.interrupted;
        reports.push(report);
        report::write_files(&reports, &outputs(&config))?;
        if interrupted {
            break;
        }
    }
    println!("Results: {}", config.db.display());
    sweep.store.close().await?;
    Ok(reports)
}

/// The files that flags name; in `--out`, a summary of each kind as well.
fn outputs(config: &Config) -> OutputArgs {
    let in_out = |name: &str| config.out.as_ref().map(|out| out.join(name));
    OutputArgs {
        json: config.output.json.clone().or_else(|| in_out("summary.json")),
        markdown: config.output.markdown.clone().or_else(|| in_out("summary.md")),
    }
}

/// What the points of a sweep share.
struct Sweep {
    config: Arc<Config>,
    samples: Arc<Vec<Sample>>,
    dataset_path: Option<String>,
    synthetic: bool,
    /// Samples used so far.
    offset: usize,
    environment: Environment,
    store: Store,
}

impl Sweep {
    /// Fails early where every request would fail: nobody listens, or the prompt does not fit the endpoint.
    async fn check(&self) -> Result<()> {
        if let Some(out) = &self.config.out {
            std::fs::create_dir_all(out).map_err(Error::io(out))?;
        }
        let load = self.load(self.config.points[0], 1);
        load.body(0)?;
        let authority = || self.config.endpoint.authority.clone();
        load.client.connect().await.map_err(|message| Error::Connect { authority: authority(), message })?;
        Ok(())
    }

    fn load(&self, point: Point, n_requests: usize) -> Load {
        Load {
            config: Arc::clone(&self.config),
            client: Arc::new(Client::new(&self.config, Instant::now())),
            samples: Arc::clone(&self.samples),
            offset: self.offset,
            n_requests,
            point,
        }
    }

    async fn point(&mut self, point: Point, n_requests: usize) -> Result<Report> {
        let mut interrupted = false;
        if self.config.warmup > 0 {
            interrupted = self.warm_up(point).await;
        }
        let load = self.load(point, n_requests);
        let mut run = self.run_row(point, n_requests);
        run.id = self.store.insert_run(&run).await?;
        if !interrupted {
            interrupted = self.measure(run.id, load).await?;
        }
        self.offset += n_requests;
        self.store.end_run(run.id, interrupted).await?;
        let run = self.store.runs(Some(run.id)).await?.remove(0);
        report::load(&mut self.store, run).await
    }

    /// Sends requests in a closed loop and forgets them. True if stopped by hand.
    async fn warm_up(&mut self, point: Point) -> bool {
        let n_requests = self.config.warmup;
        let parallel = Some(point.parallel.unwrap_or(n_requests).min(n_requests));
        let load = self.load(Point { parallel, rate: None, ..point }, n_requests);
        self.offset += n_requests;
        eprintln!("Warm-up: {n_requests} requests");
        let (sender, mut receiver) = mpsc::channel::<RequestRecord>(RECORD_QUEUE);
        let forget = async {
            let mut first_error = None;
            while let Some(record) = receiver.recv().await {
                first_error = first_error.or(record.error);
            }
            if let Some(error) = first_error {
                eprintln!("Warm-up: a request failed: {error}");
            }
        };
        tokio::select! {
            ((), ()) = async { tokio::join!(load.run(sender), forget) } => false,
            () = stop_signal() => true,
        }
    }

    /// Sends the load and stores its records as they come. True if stopped by hand.
    async fn measure(&mut self, run_id: i64, load: Load) -> Result<bool> {
        let mut progress = Progress::new(load.n_requests, self.config.log_every, Arc::clone(&load.client));
        let (sender, mut receiver) = mpsc::channel(RECORD_QUEUE);
        let sending = async {
            tokio::select! {
                () = load.run(sender) => false,
                // What is in flight is given up: its future, and with it the sender, is dropped.
                () = stop_signal() => true,
            }
        };
        let recording = async {
            let mut ticks = interval(Duration::from_millis(500));
            ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
            let mut batch = Vec::new();
            loop {
                tokio::select! {
                    n_received = receiver.recv_many(&mut batch, 512) => {
                        if n_received == 0 {
                            return Ok(());
                        }
                        batch.iter().for_each(|record| progress.add(record));
                        self.store.insert_requests(run_id, &batch).await?;
                        batch.clear();
                    }
                    _ = ticks.tick() => progress.tick(),
                }
            }
        };
        let (interrupted, recorded) = tokio::join!(sending, recording);
        progress.finish();
        recorded.map(|()| interrupted)
    }

    fn run_row(&self, point: Point, n_requests: usize) -> Run {
        let config = &self.config;
        Run {
            id: 0,
            name: config.name.clone(),
            model: config.model.clone(),
            api: config.api.name().into(),
            url: config.endpoint.url(),
            dataset: config.dataset_name.clone(),
            dataset_path: self.dataset_path.clone(),
            synthetic: self.synthetic,
            number: n_requests as i64,
            parallel: point.parallel.map(|parallel| parallel as i64),
            rate: point.rate,
            config: config.recorded.clone(),
            environment: self.environment.clone(),
            started_at: epoch_s(),
            ended_at: None,
            interrupted: false,
        }
    }
}

/// Ends when the user or the system asks the process to stop.
async fn stop_signal() {
    let (interrupt, terminate) = (signal(SignalKind::interrupt()), signal(SignalKind::terminate()));
    match (interrupt, terminate) {
        (Ok(mut interrupt), Ok(mut terminate)) => {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
        }
        // Without handlers the default action ends the process, which keeps what is stored.
        _ => std::future::pending().await,
    }
}
