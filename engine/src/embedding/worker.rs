//! [`Worker`]: the thread that owns an embedding model. Requests that wait for it run together.

use std::{
    sync::mpsc::{Receiver, Sender, channel},
    thread::JoinHandle,
};

use super::{Encoder, Pooling};
use crate::Error;

/// A thread that computes vectors.
pub(super) struct Worker {
    jobs: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
}

/// The texts of a request.
struct Job {
    texts: Vec<Vec<u32>>,
    reply: Sender<Result<Vec<Vec<f32>>, Error>>,
}

impl Worker {
    /// Gives `encoder` a thread. Requests are joined until they have `batch_tokens` tokens.
    pub(super) fn new(mut encoder: Box<dyn Encoder>, pooling: Pooling, batch_tokens: usize) -> Result<Self, Error> {
        let (jobs, receiver) = channel();
        let thread = std::thread::Builder::new()
            .name("ember-embedding".into())
            .spawn(move || run(&mut *encoder, &receiver, (pooling, batch_tokens)))
            .map_err(|e| Error::Device(format!("cannot start a thread: {e}")))?;
        Ok(Self { jobs: Some(jobs), thread: Some(thread) })
    }

    /// The vectors of `texts`; blocks.
    ///
    /// # Errors
    /// The encoder's, or [`Error::Stopped`] if its thread has ended.
    pub(super) fn embed(&self, texts: Vec<Vec<u32>>) -> Result<Vec<Vec<f32>>, Error> {
        let stopped = || Error::Stopped("its thread has ended".into());
        let (reply, result) = channel();
        self.jobs.as_ref().ok_or_else(stopped)?.send(Job { texts, reply }).map_err(|_| stopped())?;
        result.recv().map_err(|_| stopped())?
    }

    /// False once the thread has ended.
    pub(super) fn is_running(&self) -> bool {
        self.thread.as_ref().is_some_and(|thread| !thread.is_finished())
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn run(encoder: &mut dyn Encoder, jobs: &Receiver<Job>, (pooling, batch_tokens): (Pooling, usize)) {
    let n_tokens = |job: &Job| job.texts.iter().map(Vec::len).sum::<usize>();
    while let Ok(job) = jobs.recv() {
        let mut n = n_tokens(&job);
        let mut batch = vec![job];
        while n < batch_tokens
            && let Ok(job) = jobs.try_recv()
        {
            n += n_tokens(&job);
            batch.push(job);
        }
        let texts: Vec<&[u32]> = batch.iter().flat_map(|job| &job.texts).map(Vec::as_slice).collect();
        let result = encoder.encode(&texts, pooling);
        let failed = matches!(result, Err(Error::Device(_)));
        let mut vectors = result.map(Vec::into_iter);
        for job in &batch {
            let of_job = match &mut vectors {
                Ok(vectors) => Ok(vectors.take(job.texts.len()).collect()),
                Err(error) => Err(error.clone()),
            };
            // Whoever asked may be gone.
            let _ = job.reply.send(of_job);
        }
        if failed {
            // A device that failed must not be used again.
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Barrier, Mutex};

    use super::*;

    /// Answers each text with its first token; notes how many texts ran together.
    struct Fake {
        batches: Arc<Mutex<Vec<usize>>>,
        first_may_end: Arc<Barrier>,
    }

    impl Encoder for Fake {
        fn encode(&mut self, texts: &[&[u32]], _: Pooling) -> Result<Vec<Vec<f32>>, Error> {
            let mut batches = self.batches.lock().expect("not poisoned");
            batches.push(texts.len());
            if batches.len() == 1 {
                drop(batches);
                self.first_may_end.wait();
            }
            match texts[0][0] {
                666 => Err(Error::Device("gone".into())),
                _ => Ok(texts.iter().map(|text| vec![text[0] as f32]).collect()),
            }
        }
    }

    #[test]
    fn waiting_requests_run_together_and_get_their_own() {
        let (batches, first_may_end) = (Arc::default(), Arc::new(Barrier::new(2)));
        let fake = Fake { batches: Arc::clone(&batches), first_may_end: first_may_end.clone() };
        let worker = Worker::new(Box::new(fake), Pooling::Mean, 5).expect("a thread");
        std::thread::scope(|scope| {
            let ask = |id: u32, n: usize| {
                let texts: Vec<Vec<u32>> = (0..n).map(|i| vec![id + i as u32]).collect();
                let (worker, expected) = (&worker, texts.iter().map(|text| vec![text[0] as f32]).collect::<Vec<_>>());
                scope.spawn(move || assert_eq!(worker.embed(texts).expect("answered"), expected))
            };
            let first = ask(1, 1);
            // The others arrive while the first runs.
            while batches.lock().expect("not poisoned").is_empty() {
                std::thread::yield_now();
            }
            let others: Vec<_> = (0..5).map(|i| ask(10 * i, 2)).collect();
            std::thread::sleep(std::time::Duration::from_millis(200));
            first_may_end.wait();
            first.join().expect("no panic");
            others.into_iter().for_each(|other| other.join().expect("no panic"));
        });
        // 2 + 2 + 2 texts have at least 5 tokens; the last 4 fewer.
        assert_eq!(*batches.lock().expect("not poisoned"), [1, 6, 4]);
        assert!(worker.is_running());
        assert!(worker.embed(vec![vec![666]]).is_err_and(|e| matches!(e, Error::Device(_))));
        assert!(worker.embed(vec![vec![1]]).is_err_and(|e| matches!(e, Error::Stopped(_))));
        while worker.is_running() {
            std::thread::yield_now();
        }
    }
}
