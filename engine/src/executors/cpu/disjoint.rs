//! [`Disjoint`]: a slice that the tasks of a job write at different places.

use std::{marker::PhantomData, ops::Range};

/// A mutable slice shared by tasks that promise to use different elements.
pub struct Disjoint<'a, T> {
    ptr: *mut T,
    len: usize,
    lifetime: PhantomData<&'a mut [T]>,
}

// SAFETY: elements are handed to threads as if by `&mut`; whoever takes them promises that nobody else does.
unsafe impl<T: Send> Sync for Disjoint<'_, T> {}

impl<'a, T> Disjoint<'a, T> {
    /// Shares `slice`.
    pub fn new(slice: &'a mut [T]) -> Self {
        Self { ptr: slice.as_mut_ptr(), len: slice.len(), lifetime: PhantomData }
    }

    /// The elements `range`.
    ///
    /// # Safety
    /// Nobody else may use them while the result lives.
    ///
    /// # Panics
    /// If the range is out of bounds.
    #[expect(clippy::mut_from_ref, reason = "the caller promises that the elements are its own")]
    pub unsafe fn range(&self, range: Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} of {}", self.len);
        // SAFETY: within the slice; exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.add(range.start), range.len()) }
    }

    /// The element `index` and what follows, for kernels that check no bounds.
    ///
    /// # Panics
    /// If the index is out of bounds.
    pub fn ptr_at(&self, index: usize) -> *mut T {
        assert!(index < self.len, "{index} of {}", self.len);
        // SAFETY: within the slice.
        unsafe { self.ptr.add(index) }
    }
}
