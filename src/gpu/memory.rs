//! Memory of a device, and memory of the host that it can reach.

use super::driver::{cuda, Context, Stream};
use crate::error::{Error, Result};
use bytemuck::Pod;
use cudarc::driver::sys;
use std::ops::Range;
use std::sync::Arc;

/// Bytes of a device.
pub struct DeviceBuffer {
    context: Arc<Context>,
    address: sys::CUdeviceptr,
    bytes: usize,
}

impl DeviceBuffer {
    /// So many bytes (at least one), of whatever they hold; at a multiple of 256.
    pub fn new(context: &Arc<Context>, bytes: usize) -> Result<Self> {
        let _current = context.bind()?;
        let bytes = bytes.max(1);
        let mut address = 0;
        // SAFETY: a context is current.
        unsafe { cuda!(cuMemAlloc_v2(&mut address, bytes))? };
        Ok(Self { context: context.clone(), address, bytes })
    }

    /// A copy of `values`, there when this returns.
    pub fn of<T: Pod>(stream: &Stream, values: &[T]) -> Result<Self> {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        let buffer = Self::new(stream.context(), bytes.len())?;
        if !bytes.is_empty() {
            let _current = buffer.context.bind()?;
            // SAFETY: the buffer is as large; the source is kept until the stream has done it.
            let copied = unsafe {
                cuda!(cuMemcpyHtoDAsync_v2(buffer.address, bytes.as_ptr().cast(), bytes.len(), stream.raw()))
            };
            stream.synchronize()?;
            copied?;
        }
        Ok(buffer)
    }

    /// Its first byte, as kernels take it.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Bytes, at least one.
    #[allow(clippy::len_without_is_empty)] // never empty
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Fills bytes `range` with `value`, in the stream's order.
    pub fn fill(&self, stream: &Stream, range: Range<usize>, value: u8) -> Result<()> {
        self.check(&range)?;
        if range.is_empty() {
            return Ok(());
        }
        let _current = self.context.bind()?;
        // SAFETY: checked above.
        unsafe { cuda!(cuMemsetD8Async(self.address + range.start as u64, value, range.len(), stream.raw())) }
    }

    /// Copies the first `bytes` of pinned memory to `at` here, in the stream's order.
    pub(crate) fn write(&self, stream: &Stream, at: usize, from: &PinnedBuffer, bytes: usize) -> Result<()> {
        self.check(&(at..at.saturating_add(bytes)))?;
        if bytes > from.bytes {
            return Err(Error::Internal("more is copied than there is".into()));
        }
        let _current = self.context.bind()?;
        // SAFETY: checked above; pinned memory is given back only when no stream has it.
        unsafe {
            cuda!(cuMemcpyHtoDAsync_v2(self.address + at as u64, from.data.cast(), bytes, stream.raw()))
        }
    }

    /// Copies bytes `range` to `at` of pinned memory, in the stream's order.
    pub(crate) fn read(
        &self,
        stream: &Stream,
        range: Range<usize>,
        to: &PinnedBuffer,
        at: usize,
    ) -> Result<()> {
        self.check(&range)?;
        if at.saturating_add(range.len()) > to.bytes {
            return Err(Error::Internal("more is copied than there is room for".into()));
        }
        let _current = self.context.bind()?;
        // SAFETY: checked above, as in `write`.
        unsafe {
            let to = to.data.add(at).cast();
            cuda!(cuMemcpyDtoHAsync_v2(to, self.address + range.start as u64, range.len(), stream.raw()))
        }
    }

    /// Values that lie at byte `at`, once the stream has done what it has.
    pub fn values<T: Pod>(&self, stream: &Stream, at: usize, count: usize) -> Result<Vec<T>> {
        let bytes = count.saturating_mul(size_of::<T>());
        self.check(&(at..at.saturating_add(bytes)))?;
        let mut values = vec![T::zeroed(); count];
        if bytes > 0 {
            let _current = self.context.bind()?;
            // SAFETY: checked above; the destination is kept until the stream has done it.
            let copied = unsafe {
                cuda!(cuMemcpyDtoHAsync_v2(
                    values.as_mut_ptr().cast(),
                    self.address + at as u64,
                    bytes,
                    stream.raw()
                ))
            };
            stream.synchronize()?;
            copied?;
        }
        Ok(values)
    }

    /// Values to byte `at`, there when this returns.
    pub fn set<T: Pod>(&self, stream: &Stream, at: usize, values: &[T]) -> Result<()> {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        self.check(&(at..at.saturating_add(bytes.len())))?;
        if bytes.is_empty() {
            return Ok(());
        }
        let _current = self.context.bind()?;
        // SAFETY: checked above; the source is kept until the stream has done it.
        let copied = unsafe {
            cuda!(cuMemcpyHtoDAsync_v2(
                self.address + at as u64,
                bytes.as_ptr().cast(),
                bytes.len(),
                stream.raw()
            ))
        };
        stream.synchronize()?;
        copied
    }

    fn check(&self, range: &Range<usize>) -> Result<()> {
        if range.start <= range.end && range.end <= self.bytes {
            return Ok(());
        }
        Err(Error::Internal(format!("bytes {range:?} of a device buffer of {}", self.bytes)))
    }
}

impl Drop for DeviceBuffer {
    fn drop(&mut self) {
        // The driver says no by itself where this fails.
        let _current = self.context.bind();
        // SAFETY: made by us; the driver waits for work that still uses it.
        unsafe { sys::cuMemFree_v2(self.address) };
    }
}

/// Bytes of the host that the device reads and writes itself.
pub struct PinnedBuffer {
    context: Arc<Context>,
    data: *mut u8,
    bytes: usize,
}

// SAFETY: plain memory with one owner.
unsafe impl Send for PinnedBuffer {}

impl PinnedBuffer {
    /// So many bytes (at least one), all 0.
    pub fn new(context: &Arc<Context>, bytes: usize) -> Result<Self> {
        let _current = context.bind()?;
        let bytes = bytes.max(1);
        let mut data = std::ptr::null_mut();
        // SAFETY: a context is current.
        unsafe {
            cuda!(cuMemHostAlloc(&mut data, bytes, 0))?;
            data.cast::<u8>().write_bytes(0, bytes);
        }
        Ok(Self { context: context.clone(), data: data.cast(), bytes })
    }

    /// Bytes, at least one.
    #[allow(clippy::len_without_is_empty)] // never empty
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// What it holds. Only while no stream writes to it.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: so many bytes are ours, and all were written.
        unsafe { std::slice::from_raw_parts(self.data, self.bytes) }
    }

    /// As [`Self::bytes`], to be written. Only while no stream reads from it or writes to it.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`.
        unsafe { std::slice::from_raw_parts_mut(self.data, self.bytes) }
    }
}

impl Drop for PinnedBuffer {
    fn drop(&mut self) {
        // The driver says no by itself where this fails.
        let _current = self.context.bind();
        // SAFETY: made by us.
        unsafe { sys::cuMemFreeHost(self.data.cast()) };
    }
}
