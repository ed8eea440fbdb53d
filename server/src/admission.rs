//! [`Admission`]: how many sequences may be running or waiting at once.

use std::sync::Arc;

use hyper::StatusCode;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::ApiError;

/// Admits requests until the batch and the queue are full. tower's own limits free their permit
/// when the response head is ready; this one lives as long as the answer.
#[derive(Debug, Clone)]
pub struct Admission {
    free: Arc<Semaphore>,
    capacity: usize,
}

/// One admitted request. Dropping it makes room.
#[derive(Debug)]
pub struct Permit {
    _permit: OwnedSemaphorePermit,
}

impl Admission {
    /// Room for `max_num_seqs` running sequences and `max_num_queued_reqs` waiting ones; `None` queues without limit.
    pub fn new(max_num_seqs: usize, max_num_queued_reqs: Option<usize>) -> Self {
        let capacity = max_num_queued_reqs.map_or(Semaphore::MAX_PERMITS, |queued| {
            max_num_seqs.saturating_add(queued).clamp(1, Semaphore::MAX_PERMITS)
        });
        Self { free: Arc::new(Semaphore::new(capacity)), capacity }
    }

    /// Admits a request of `n_seqs` sequences. One of more sequences than there is room for in all
    /// is admitted when nothing else is there.
    ///
    /// # Errors
    /// Status 503 when full.
    pub fn admit(&self, n_seqs: usize) -> Result<Permit, ApiError> {
        let n_permits = u32::try_from(n_seqs.min(self.capacity)).unwrap_or(u32::MAX);
        let permit = self.free.clone().try_acquire_many_owned(n_permits).map_err(|_| {
            ApiError::http_with(
                StatusCode::SERVICE_UNAVAILABLE,
                "The server's request queue is full (--max-num-queued-reqs). Retry later.",
            )
        })?;
        Ok(Permit { _permit: permit })
    }

    /// Sequences admitted and not yet finished.
    pub fn n_admitted(&self) -> usize {
        self.capacity - self.free.available_permits()
    }
}
