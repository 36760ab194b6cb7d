//! Large buffers on large pages: a network streams through its arena, a training step through hundreds of megabytes, and
//! walking page tables for every 4 KiB (twice, on a virtual machine) costs up to a fifth of the time.

/// Smallest buffer that is asked for on large pages, bytes.
const LEAST: usize = 4 << 20;

/// Asks for large pages for memory that was not touched yet, where it is large.
pub(super) fn large<T>(memory: &mut Vec<T>) {
    let bytes = memory.capacity() * size_of::<T>();
    if bytes >= LEAST {
        advise(memory.as_mut_ptr() as usize, bytes);
    }
}

/// A buffer of `len` zeros (default values), on large pages where it is large and the system has them.
pub fn buffer<T: Copy + Default>(len: usize) -> Vec<T> {
    let mut buffer = Vec::with_capacity(len);
    // Before the first touch, or the small pages are there already.
    large(&mut buffer);
    buffer.resize(len, T::default());
    buffer
}

/// madvise(MADV_HUGEPAGE) on the whole pages inside; a hint, so that its failure does not matter.
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
fn advise(start: usize, bytes: usize) {
    const SYS_MADVISE: i64 = 28;
    const MADV_HUGEPAGE: i64 = 14;
    const PAGE: usize = 4096;
    let (first, end) = (start.next_multiple_of(PAGE), (start + bytes) / PAGE * PAGE);
    let _result: i64;
    // SAFETY: the advice changes no contents; the range lies inside one allocation of ours. The kernel clobbers rcx, r11.
    unsafe {
        std::arch::asm!("syscall", inlateout("rax") SYS_MADVISE => _result, in("rdi") first,
            in("rsi") end.saturating_sub(first), in("rdx") MADV_HUGEPAGE, lateout("rcx") _, lateout("r11") _,
            options(nostack));
    }
}

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
fn advise(_: usize, _: usize) {}
