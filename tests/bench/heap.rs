//! Counts the bytes on the heap, while it is told to.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    mem::forget,
    sync::atomic::{AtomicBool, AtomicIsize, Ordering::Relaxed},
};

struct Counting;

static ON: AtomicBool = AtomicBool::new(false);
static LIVE: AtomicIsize = AtomicIsize::new(0);

/// How many bytes more lie on the heap after `fill`. What it returns, which holds them, is leaked: moka frees some of what was
/// dropped much later, while the next one is counted.
pub fn grown<T>(fill: impl FnOnce() -> T) -> isize {
    LIVE.store(0, Relaxed);
    ON.store(true, Relaxed);
    let held = fill();
    ON.store(false, Relaxed);
    forget(held);
    LIVE.load(Relaxed)
}

fn count(bytes: isize) {
    if ON.load(Relaxed) {
        LIVE.fetch_add(bytes, Relaxed);
    }
}

// SAFETY: every call goes to the system's allocator as it came. Counting neither allocates nor fails.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: as the caller promises.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        count(new_size as isize - layout.size() as isize);
        // SAFETY: as the caller promises.
        unsafe { System.realloc(pointer, layout, new_size) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;
