//! Pages of the KV cache: who holds them, which prefix they hold, which may be taken next.
//! Page numbers only; the memory itself belongs to the executor.

use std::collections::HashMap;

use crate::step::PAGE_SIZE;

/// Number of a page, below [`KvPool::n_pages`].
pub type PageId = u32;

/// Names a token prefix of whole pages. Equal ids mean equal tokens and equal cache salt: ids are
/// handed out per (parent prefix, page of tokens), so there are no hash collisions to fear.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PrefixId(u64);

/// A page's place in the prefix tree: what came before it, and its own tokens.
type PageKey = (PrefixId, [u32; PAGE_SIZE]);

const NONE: u32 = u32::MAX;

#[derive(Debug, Clone)]
struct Page {
    n_refs: u32,
    /// Set while the page's content can be found by prefix.
    key: Option<Box<PageKey>>,
    /// Neighbours in the list of free pages, while `n_refs` is 0.
    prev: u32,
    next: u32,
}

/// The pages of one sequence, in token order. Give it back with [`KvPool::release`].
#[derive(Debug, Default)]
pub struct BlockTable {
    pages: Vec<PageId>,
    /// Leading pages that were offered to the prefix cache, and the prefix they make.
    n_registered: usize,
    prefix: Option<PrefixId>,
}

impl BlockTable {
    /// Page of tokens `0..16`, of `16..32`, ...
    pub fn pages(&self) -> &[PageId] {
        &self.pages
    }

    /// Tokens that fit into the pages held.
    pub fn capacity(&self) -> usize {
        self.pages.len() * PAGE_SIZE
    }
}

/// All pages of a KV cache.
///
/// Free pages form one list. Pages of no use to anyone are taken first (most recently freed first,
/// so that untouched memory stays untouched), then pages that still hold a cached prefix, least
/// recently used first.
#[derive(Debug)]
pub struct KvPool {
    pages: Vec<Page>,
    free_head: u32,
    free_tail: u32,
    n_free: usize,
    prefix_caching: bool,
    by_key: HashMap<PageKey, (PageId, PrefixId)>,
    roots: HashMap<String, PrefixId>,
    next_prefix: u64,
}

impl KvPool {
    /// A pool of `n_pages` free pages.
    pub fn new(n_pages: usize, prefix_caching: bool) -> Self {
        let mut pool = Self {
            pages: vec![Page { n_refs: 0, key: None, prev: NONE, next: NONE }; n_pages],
            free_head: NONE,
            free_tail: NONE,
            n_free: 0,
            prefix_caching,
            by_key: HashMap::new(),
            roots: HashMap::new(),
            next_prefix: 1,
        };
        for page in 0..n_pages as u32 {
            pool.push_free_back(page);
        }
        pool
    }

    /// Pages in all.
    pub fn n_pages(&self) -> usize {
        self.pages.len()
    }

    /// Pages that no sequence holds, those with a cached prefix included.
    pub fn n_free(&self) -> usize {
        self.n_free
    }

    /// Takes the pages of the longest cached prefix of `tokens` into the empty `table` and returns
    /// how many tokens they hold: whole pages, and always less than `tokens.len()`, since the last
    /// token must be computed to sample the next.
    pub fn acquire_prefix(&mut self, table: &mut BlockTable, tokens: &[u32], salt: Option<&str>) -> usize {
        debug_assert!(table.pages.is_empty());
        if !self.prefix_caching {
            return 0;
        }
        let mut prefix = self.root(salt);
        table.prefix = Some(prefix);
        let n_usable = tokens.len().saturating_sub(1) / PAGE_SIZE;
        for chunk in tokens.chunks_exact(PAGE_SIZE).take(n_usable) {
            let Some(&(page, next)) = self.by_key.get(&(prefix, page_tokens(chunk))) else {
                break;
            };
            self.hold(page);
            table.pages.push(page);
            prefix = next;
        }
        table.n_registered = table.pages.len();
        table.prefix = Some(prefix);
        table.capacity()
    }

    /// Adds pages to `table` until it holds `n_tokens` tokens. All or nothing: on `false` nothing changed.
    #[must_use]
    pub fn grow(&mut self, table: &mut BlockTable, n_tokens: usize) -> bool {
        let n_more = n_tokens.div_ceil(PAGE_SIZE).saturating_sub(table.pages.len());
        if n_more > self.n_free {
            return false;
        }
        for _ in 0..n_more {
            let page = self.free_head;
            if let Some(key) = self.pages[page as usize].key.take() {
                self.by_key.remove(&*key);
            }
            self.hold(page);
            table.pages.push(page);
        }
        true
    }

    /// Offers the full pages among the first `n_computed` of `tokens` to the prefix cache.
    /// `tokens` are the sequence's tokens from its first on.
    pub fn register(&mut self, table: &mut BlockTable, tokens: &[u32], n_computed: usize) {
        let Some(mut prefix) = table.prefix else {
            return;
        };
        let n_full = n_computed.min(tokens.len()) / PAGE_SIZE;
        for i in table.n_registered..n_full.min(table.pages.len()) {
            let key = (prefix, page_tokens(&tokens[i * PAGE_SIZE..(i + 1) * PAGE_SIZE]));
            prefix = match self.by_key.get(&key) {
                // Another sequence computed the same page; ours stays private.
                Some(&(_, known)) => known,
                None => {
                    let page = table.pages[i];
                    let new = self.new_prefix();
                    self.pages[page as usize].key = Some(Box::new(key));
                    self.by_key.insert(key, (page, new));
                    new
                }
            };
            table.n_registered = i + 1;
        }
        table.prefix = Some(prefix);
    }

    /// Gives all pages of `table` back.
    pub fn release(&mut self, table: &mut BlockTable) {
        // Last page first, so that among cached pages the ends of prefixes are evicted before their beginnings.
        for page in table.pages.drain(..).rev() {
            let entry = &mut self.pages[page as usize];
            entry.n_refs -= 1;
            if entry.n_refs == 0 {
                if entry.key.is_some() {
                    self.push_free_back(page);
                } else {
                    self.push_free_front(page);
                }
            }
        }
        *table = BlockTable::default();
    }

    fn root(&mut self, salt: Option<&str>) -> PrefixId {
        // Salts are the caller's; forgetting them all only costs cache hits.
        const MAX_SALTS: usize = 65_536;
        let salt = salt.unwrap_or("");
        if let Some(&root) = self.roots.get(salt) {
            return root;
        }
        if self.roots.len() >= MAX_SALTS {
            self.roots.clear();
        }
        let root = self.new_prefix();
        self.roots.insert(salt.to_owned(), root);
        root
    }

    fn new_prefix(&mut self) -> PrefixId {
        self.next_prefix += 1;
        PrefixId(self.next_prefix)
    }

    fn hold(&mut self, page: PageId) {
        if self.pages[page as usize].n_refs == 0 {
            self.unlink_free(page);
        }
        self.pages[page as usize].n_refs += 1;
    }

    fn push_free_back(&mut self, page: PageId) {
        let tail = self.free_tail;
        let entry = &mut self.pages[page as usize];
        (entry.prev, entry.next) = (tail, NONE);
        match tail {
            NONE => self.free_head = page,
            tail => self.pages[tail as usize].next = page,
        }
        self.free_tail = page;
        self.n_free += 1;
    }

    fn push_free_front(&mut self, page: PageId) {
        let head = self.free_head;
        let entry = &mut self.pages[page as usize];
        (entry.prev, entry.next) = (NONE, head);
        match head {
            NONE => self.free_tail = page,
            head => self.pages[head as usize].prev = page,
        }
        self.free_head = page;
        self.n_free += 1;
    }

    fn unlink_free(&mut self, page: PageId) {
        let (prev, next) = (self.pages[page as usize].prev, self.pages[page as usize].next);
        match prev {
            NONE => self.free_head = next,
            prev => self.pages[prev as usize].next = next,
        }
        match next {
            NONE => self.free_tail = prev,
            next => self.pages[next as usize].prev = prev,
        }
        self.n_free -= 1;
    }
}

fn page_tokens(chunk: &[u32]) -> [u32; PAGE_SIZE] {
    chunk.try_into().expect("a page is PAGE_SIZE tokens")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn tokens(n: usize) -> Vec<u32> {
        (0..n as u32).collect()
    }

    #[test]
    fn a_computed_prefix_is_found_again_but_never_the_whole_prompt() {
        let mut pool = KvPool::new(8, true);
        let mut a = BlockTable::default();
        assert_eq!(pool.acquire_prefix(&mut a, &tokens(48), None), 0);
        assert!(pool.grow(&mut a, 48));
        pool.register(&mut a, &tokens(48), 48);
        let pages = a.pages().to_vec();
        pool.release(&mut a);
        assert_eq!(pool.n_free(), 8);

        let mut b = BlockTable::default();
        assert_eq!(pool.acquire_prefix(&mut b, &tokens(48), None), 32, "the last token must be computed");
        assert_eq!(b.pages(), &pages[..2]);
        let mut c = BlockTable::default();
        assert_eq!(pool.acquire_prefix(&mut c, &tokens(49), None), 48);
        let mut salted = BlockTable::default();
        assert_eq!(pool.acquire_prefix(&mut salted, &tokens(49), Some("other")), 0);
        assert_eq!(pool.n_free(), 5);
    }

    #[test]
    fn without_prefix_caching_nothing_is_found() {
        let mut pool = KvPool::new(4, false);
        let mut a = BlockTable::default();
        assert_eq!(pool.acquire_prefix(&mut a, &tokens(32), None), 0);
        assert!(pool.grow(&mut a, 32));
        pool.register(&mut a, &tokens(32), 32);
        pool.release(&mut a);
        assert_eq!(pool.acquire_prefix(&mut BlockTable::default(), &tokens(33), None), 0);
    }

    #[test]
    fn useless_pages_go_before_cached_ones_and_ends_before_beginnings() {
        let mut pool = KvPool::new(4, true);
        let mut cached = BlockTable::default();
        pool.acquire_prefix(&mut cached, &tokens(32), None);
        assert!(pool.grow(&mut cached, 32));
        pool.register(&mut cached, &tokens(32), 32);
        pool.release(&mut cached);

        let mut other = BlockTable::default();
        assert!(pool.grow(&mut other, 3 * PAGE_SIZE));
        let mut again = BlockTable::default();
        assert_eq!(pool.acquire_prefix(&mut again, &tokens(40), None), 16, "the prefix's end was evicted");
    }

    #[test]
    fn growth_is_all_or_nothing() {
        let mut pool = KvPool::new(2, true);
        let mut a = BlockTable::default();
        assert!(!pool.grow(&mut a, 33));
        assert_eq!((a.pages().len(), pool.n_free()), (0, 2));
        assert!(pool.grow(&mut a, 32));
        assert_eq!(pool.n_free(), 0);
    }

    proptest! {
        /// Whatever sequences come, share and go: every page is free or held, and counted once.
        #[test]
        fn no_page_is_lost_or_freed_twice(ops in proptest::collection::vec((0usize..4, 0usize..6, 1usize..80), 1..200)) {
            let mut pool = KvPool::new(12, true);
            let mut tables: Vec<(BlockTable, Vec<u32>)> = Vec::new();
            for (op, which, n) in ops {
                match op {
                    0 => {
                        let prompt: Vec<u32> = (0..n as u32).map(|t| t / 20 + which as u32 / 3).collect();
                        let mut table = BlockTable::default();
                        pool.acquire_prefix(&mut table, &prompt, None);
                        if pool.grow(&mut table, prompt.len()) {
                            tables.push((table, prompt));
                        } else {
                            pool.release(&mut table);
                        }
                    }
                    1 if !tables.is_empty() => {
                        let i = which % tables.len();
                        let (table, prompt) = &mut tables[i];
                        pool.register(table, prompt, n);
                    }
                    2 if !tables.is_empty() => {
                        let i = which % tables.len();
                        let capacity = tables[i].0.capacity();
                        let _ = pool.grow(&mut tables[i].0, capacity + n);
                    }
                    _ if !tables.is_empty() => {
                        let (mut table, _) = tables.swap_remove(which % tables.len());
                        pool.release(&mut table);
                    }
                    _ => {}
                }
                let mut held = vec![0u32; pool.n_pages()];
                for (table, _) in &tables {
                    for &page in table.pages() {
                        held[page as usize] += 1;
                    }
                }
                let n_held = held.iter().filter(|&&n| n > 0).count();
                prop_assert_eq!(n_held + pool.n_free(), pool.n_pages());
                for (page, &n) in pool.pages.iter().zip(&held) {
                    prop_assert_eq!(page.n_refs, n);
                }
                for (key, (page, _)) in &pool.by_key {
                    prop_assert_eq!(pool.pages[*page as usize].key.as_deref(), Some(key));
                }
            }
            for (mut table, _) in tables {
                pool.release(&mut table);
            }
            prop_assert_eq!(pool.n_free(), pool.n_pages());
        }
    }
}
