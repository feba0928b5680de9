//! Postcopy: guest memory whose pages arrive from the source while rings already run (rule P1).
//!
//! A worker that touches a missing page blocks in the kernel until the front-end, which has the userfaultfd, provides
//! the page. Nothing else in this process accesses guest memory meanwhile.

#![forbid(unsafe_code)]

use std::os::fd::{AsFd, OwnedFd};

use tracing::debug;
use zerocopy::IntoBytes;

use crate::abi::vhost_user::{MemoryHeader, MemoryRegion};
use crate::backend::{BackendError, VhostUserMessage};
use crate::memory::{FaultAddress, Memory, Userfault};
use crate::sys::log_limit::limited;
use crate::sys::with_causes::with_causes;

/// The postcopy state of a connection. Dropping it abandons incomplete guest memory.
#[derive(Default)]
pub(super) struct Postcopy {
    userfault: Option<Userfault>,
    listening: bool,
    /// Registered memory in use.
    memory: Memory,
    /// Registered memory whose table the front-end has not acknowledged yet.
    unacknowledged: Option<Memory>,
}

impl Postcopy {
    /// Handles POSTCOPY_ADVISE. Returns the userfaultfd for the front-end.
    pub(super) fn advise(&mut self) -> Result<OwnedFd, BackendError> {
        if self.listening {
            return Err(order_error("POSTCOPY_ADVISE came after POSTCOPY_LISTEN: send POSTCOPY_END first"));
        }
        let userfault = Userfault::new()?;
        let fd = userfault.as_fd().try_clone_to_owned().map_err(BackendError::system("pass on a userfaultfd"))?;
        self.userfault = Some(userfault);
        Ok(fd)
    }

    /// Handles POSTCOPY_LISTEN: later memory tables are incomplete.
    pub(super) fn listen(&mut self) -> Result<(), BackendError> {
        if self.userfault.is_none() {
            return Err(order_error("POSTCOPY_LISTEN came without POSTCOPY_ADVISE"));
        }
        self.listening = true;
        Ok(())
    }

    /// Returns true if memory tables are incomplete.
    pub(super) fn is_listening(&self) -> bool {
        self.listening
    }

    /// Registers a new memory table, which is used once it is acknowledged.
    pub(super) fn offer(&mut self, memory: Memory) -> Result<(), BackendError> {
        if let Some(userfault) = &self.userfault {
            memory.regions().iter().try_for_each(|region| userfault.register(region))?;
        }
        self.unacknowledged = Some(memory);
        Ok(())
    }

    /// Returns true if the next message must be the acknowledgement of a memory table.
    pub(super) fn awaits_acknowledgement(&self) -> bool {
        self.unacknowledged.is_some()
    }

    /// Handles the acknowledgement of a memory table, and returns the memory to use.
    pub(super) fn acknowledge(&mut self, message: &VhostUserMessage, is_table: bool) -> Result<Memory, BackendError> {
        let memory = self.unacknowledged.take().unwrap_or_default();
        if !is_table || message.body::<u64>()? != 0 {
            abandon_memory(self.userfault.as_ref(), &memory);
            return Err(order_error("SET_MEM_TABLE was answered and then not acknowledged by a u64 of 0"));
        }
        self.memory = memory.clone();
        Ok(memory)
    }

    /// Handles POSTCOPY_END: all pages have arrived.
    pub(super) fn end(&mut self) -> Result<(), BackendError> {
        let Some(userfault) = self.userfault.take() else {
            return Err(order_error("POSTCOPY_END came without POSTCOPY_ADVISE"));
        };
        for region in std::mem::take(&mut self.memory).regions() {
            if let Err(error) = userfault.unregister(region) {
                limited!(warn, "{}", with_causes(&error));
            }
        }
        self.listening = false;
        Ok(())
    }
}

impl Drop for Postcopy {
    fn drop(&mut self) {
        for memory in [&self.memory, self.unacknowledged.as_ref().unwrap_or(&Memory::default())] {
            abandon_memory(self.userfault.as_ref(), memory);
        }
    }
}

/// Releases threads that wait for pages which will not arrive any more. The shared memory may still be in use
/// elsewhere, so this process continues on private zero pages.
fn abandon_memory(userfault: Option<&Userfault>, memory: &Memory) {
    let Some(userfault) = userfault else { return };
    for region in memory.regions() {
        debug!("memory at {:#x} is abandoned: its pages will not arrive", region.gpa().0);
        let (start, len) = region.mapped();
        if let Err(error) = region.blank().and_then(|()| userfault.wake(FaultAddress(start), len)) {
            limited!(warn, "can't abandon memory at {:#x}: {}", region.gpa().0, with_causes(&error));
        }
    }
}

/// Returns the payload of SET_MEM_TABLE with the addresses of this process, as its reply.
pub(super) fn reply_payload(payload: &[u8], memory: &Memory) -> Vec<u8> {
    let (head, regions) = payload.split_at_checked(size_of::<MemoryHeader>()).unwrap_or_default();
    let mut answer = head.to_vec();
    let (descriptions, rest) = regions.as_chunks::<{ size_of::<MemoryRegion>() }>();
    for bytes in descriptions {
        let mut description: MemoryRegion = zerocopy::transmute!(*bytes);
        if let Some(region) = memory.regions().iter().find(|region| region.gpa().0 == description.guest_phys_addr) {
            description.userspace_addr = region.host_ptr().addr() as u64;
        }
        answer.extend(description.as_bytes());
    }
    answer.extend(rest);
    answer
}

fn order_error(why: &'static str) -> BackendError {
    BackendError::Postcopy { why }
}
