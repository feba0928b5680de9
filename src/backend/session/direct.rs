//! Front-ends that are reached by calls instead of messages: the kernel, in front of a VDUSE device.

#![forbid(unsafe_code)]

use std::fmt::Debug;

use crate::memory::{Iotlb, Iova, Memory, MemoryError};

/// A front-end without a back-end channel.
pub(crate) trait DirectFrontend: Debug + Send + Sync {
    /// Notifies the driver that configuration space has changed. Must not block.
    fn config_changed(&self);

    /// Notifies the driver that buffers of a ring were used.
    fn call(&self, ring: u16);

    /// Adds the mapping of an I/O virtual address to `iotlb`. Returns all memory that is mapped into this process.
    ///
    /// # Errors
    /// The address is not mapped, or its memory cannot be mapped into this process.
    fn translate(&self, iova: Iova, iotlb: &Iotlb) -> Result<Memory, MemoryError>;
}
