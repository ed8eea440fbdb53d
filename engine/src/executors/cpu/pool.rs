//! [`Pool`]: fork-join over a few threads with little latency.
//!
//! A decode step of a small model forks a hundred times within milliseconds, so workers watch for the next job for
//! a while before they sleep, and a job ends when its tasks have ended, not when every worker has looked at it: a
//! worker that the system has put aside delays nothing but the task it holds.

use std::{
    any::Any,
    cell::UnsafeCell,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

/// How long a worker watches for work before it sleeps.
const WATCH: Duration = Duration::from_micros(100);
/// Turns of the watching loop between two looks at the clock.
const TURNS_PER_LOOK: u32 = 256;

/// A few threads that share the tasks of one job at a time. The thread that calls [`Pool::run`] is one of them.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

/// A job: a function of the task's number. The lifetime is that of [`Pool::run`]'s call.
type Job = *const (dyn Fn(usize) + Sync);

struct Shared {
    /// Tasks of the current job (high half) and the next one to take (low half, which may run past).
    tickets: AtomicU64,
    /// Read only by holders of an unfinished ticket, written only when there are none.
    job: UnsafeCell<Option<Job>>,
    n_done: AtomicUsize,
    n_sleeping: AtomicUsize,
    stop: AtomicBool,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

// SAFETY: `job` is written by the one thread in `Pool::run` (it takes `&mut self`) while no ticket is out, and read by
// ticket holders after the write (release and acquire on `tickets`); what it points to is `Sync`.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Pool {
    /// A pool of `n_threads` threads, the caller's included.
    ///
    /// # Errors
    /// If the system gives no thread.
    pub fn new(n_threads: usize) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            tickets: AtomicU64::new(0),
            job: UnsafeCell::new(None),
            n_done: AtomicUsize::new(0),
            n_sleeping: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            panic: Mutex::new(None),
        });
        let mut pool = Self { shared, workers: Vec::new() };
        for i in 1..n_threads {
            let shared = pool.shared.clone();
            let worker = std::thread::Builder::new().name(format!("ember-cpu-{i}")).spawn(move || shared.work())?;
            pool.workers.push(worker);
        }
        Ok(pool)
    }

    /// Threads, the caller's included.
    pub fn n_threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `task` with each of `0..n_tasks`, on any of the threads, and returns when all have returned.
    ///
    /// # Panics
    /// If a task panics, after the others have ended.
    pub fn run(&mut self, n_tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        if n_tasks <= 1 || self.workers.is_empty() {
            (0..n_tasks).for_each(task);
            return;
        }
        let shared = &*self.shared;
        let n_tasks_bits = u64::from(u32::try_from(n_tasks).expect("fewer than 2^32 tasks")) << 32;
        // SAFETY: the transmute only forgets the lifetime; the pointer is used by ticket holders alone, and this call
        // waits for every ticket. No ticket of an earlier job is out.
        unsafe {
            *shared.job.get() = Some(std::mem::transmute::<*const (dyn Fn(usize) + Sync + '_), Job>(task));
        }
        shared.n_done.store(0, Ordering::Relaxed);
        // Sequentially consistent with `n_sleeping`: either the worker sees the tickets or we see that it sleeps.
        shared.tickets.store(n_tasks_bits, Ordering::SeqCst);
        if shared.n_sleeping.load(Ordering::SeqCst) > 0 {
            self.workers.iter().for_each(|worker| worker.thread().unpark());
        }
        while shared.run_one() {}
        let mut turns = 0u32;
        while shared.n_done.load(Ordering::Acquire) < n_tasks {
            turns += 1;
            if turns.is_multiple_of(4096) {
                // A worker lost its core in the middle of a task.
                std::thread::yield_now();
            } else {
                std::hint::spin_loop();
            }
        }
        if let Some(panic) = shared.panic.lock().unwrap_or_else(PoisonError::into_inner).take() {
            resume_unwind(panic);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            // Tasks' panics are caught, so a worker ends well.
            let _ = worker.join();
        }
    }
}

impl Shared {
    fn has_work(&self, order: Ordering) -> bool {
        let tickets = self.tickets.load(order);
        (tickets as u32) < (tickets >> 32) as u32
    }

    /// Runs the next task, if there is one.
    fn run_one(&self) -> bool {
        if !self.has_work(Ordering::Relaxed) {
            return false;
        }
        let ticket = self.tickets.fetch_add(1, Ordering::AcqRel);
        let (index, n_tasks) = (ticket as u32, (ticket >> 32) as u32);
        if index >= n_tasks {
            return false;
        }
        // SAFETY: our ticket is out, so the job stands until we count it as done.
        let job = unsafe { &*(*self.job.get()).expect("set before the tickets") };
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| job(index as usize))) {
            *self.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(panic);
        }
        self.n_done.fetch_add(1, Ordering::Release);
        true
    }

    fn work(&self) {
        while !self.stop.load(Ordering::Relaxed) {
            if self.run_one() {
                continue;
            }
            let since = Instant::now();
            let mut turns = 0u32;
            while !self.has_work(Ordering::Relaxed) {
                turns += 1;
                if turns.is_multiple_of(TURNS_PER_LOOK) && since.elapsed() > WATCH {
                    self.sleep();
                    break;
                }
                std::hint::spin_loop();
            }
        }
    }

    fn sleep(&self) {
        self.n_sleeping.fetch_add(1, Ordering::SeqCst);
        while !self.has_work(Ordering::SeqCst) && !self.stop.load(Ordering::SeqCst) {
            std::thread::park();
        }
        self.n_sleeping.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Physical cores that this process may use: no more than the affinity mask and the control group's quota give.
pub fn usable_cores() -> usize {
    let logical = std::thread::available_parallelism().map_or(1, usize::from);
    physical_cores().map_or(logical, |physical| physical.clamp(1, logical))
}

/// Cores behind the logical processors of this process's affinity mask, where Linux tells.
fn physical_cores() -> Option<usize> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let allowed = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?;
    let mut cores = std::collections::HashSet::new();
    for cpu in parse_cpu_list(allowed)? {
        let path = format!("/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list");
        cores.insert(std::fs::read_to_string(path).ok()?);
    }
    Some(cores.len())
}

/// The numbers of a list such as `0-3,8`.
fn parse_cpu_list(list: &str) -> Option<Vec<usize>> {
    let mut cpus = Vec::new();
    for range in list.trim().split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        cpus.extend(first.parse::<usize>().ok()?..=last.parse().ok()?);
    }
    Some(cpus)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once_in_many_short_jobs() {
        let mut pool = Pool::new(4).expect("threads");
        for job in 0..2000 {
            let counts: Vec<AtomicUsize> = (0..job % 13).map(|_| AtomicUsize::new(0)).collect();
            pool.run(counts.len(), &|i| {
                counts[i].fetch_add(1, Ordering::Relaxed);
            });
            assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1), "job {job}");
            if job % 500 == 0 {
                // Long enough for every worker to fall asleep.
                std::thread::sleep(3 * WATCH);
            }
        }
    }

    #[test]
    fn a_panic_comes_back_after_the_other_tasks() {
        let mut pool = Pool::new(3).expect("threads");
        let n_run = AtomicUsize::new(0);
        let result = catch_unwind(AssertUnwindSafe(|| {
            pool.run(20, &|i| {
                n_run.fetch_add(1, Ordering::Relaxed);
                assert!(i != 7, "task seven");
            });
        }));
        assert!(result.is_err());
        assert_eq!(n_run.load(Ordering::Relaxed), 20);
        pool.run(5, &|_| ());
    }

    #[test]
    fn cpu_lists_are_read() {
        assert_eq!(parse_cpu_list("0-3,8\n"), Some(vec![0, 1, 2, 3, 8]));
        assert_eq!(parse_cpu_list("x"), None);
        assert!(usable_cores() >= 1);
    }
}
