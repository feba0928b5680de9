//! Guest memory that comes from the source while its rings run already (rules P1.4 to P1.8).
//!
//! A worker that touches a page which is not there yet waits in the kernel, and the front-end, which has the userfaultfd,
//! brings the page. Nobody else here touches guest memory meanwhile.

#![forbid(unsafe_code)]

use std::os::fd::{AsFd, OwnedFd};

use tracing::debug;
use zerocopy::IntoBytes;

use super::{BackendError, VhostUserMessage};
use crate::abi::vhost_user::{MemoryHeader, MemoryRegion};
use crate::memory::{Memory, Userfault};
use crate::sys::log_limit::limited;

/// How far the postcopy of a connection is. Dropping it gives up guest memory that is not complete.
#[derive(Default)]
pub(super) struct Postcopy {
    userfault: Option<Userfault>,
    listening: bool,
    /// What is registered and in use.
    memory: Memory,
    /// What is registered, and waits until the front-end says that it will bring pages.
    unacknowledged: Option<Memory>,
}

impl Postcopy {
    /// POSTCOPY_ADVISE: the fd for the front-end.
    pub(super) fn advise(&mut self) -> Result<OwnedFd, BackendError> {
        if self.listening {
            return Err(order_error("POSTCOPY_ADVISE came after POSTCOPY_LISTEN: send POSTCOPY_END first"));
        }
        let userfault = Userfault::new()?;
        let fd = userfault.as_fd().try_clone_to_owned().map_err(BackendError::system("pass on a userfaultfd"))?;
        self.userfault = Some(userfault);
        Ok(fd)
    }

    /// POSTCOPY_LISTEN: memory tables from now on are not complete.
    pub(super) fn listen(&mut self) -> Result<(), BackendError> {
        if self.userfault.is_none() {
            return Err(order_error("POSTCOPY_LISTEN came without POSTCOPY_ADVISE"));
        }
        self.listening = true;
        Ok(())
    }

    /// Whether memory tables are not complete.
    pub(super) fn is_listening(&self) -> bool {
        self.listening
    }

    /// Registers a new table of memory, which is to be used when it is acknowledged.
    pub(super) fn offer(&mut self, memory: Memory) -> Result<(), BackendError> {
        if let Some(userfault) = &self.userfault {
            memory.regions().iter().try_for_each(|region| userfault.register(region))?;
        }
        self.unacknowledged = Some(memory);
        Ok(())
    }

    /// Whether the next message must be the acknowledgement of what was offered.
    pub(super) fn awaits_acknowledgement(&self) -> bool {
        self.unacknowledged.is_some()
    }

    /// What was offered, to be used from now on.
    pub(super) fn acknowledge(&mut self, message: &VhostUserMessage, is_table: bool) -> Result<Memory, BackendError> {
        let memory = self.unacknowledged.take().unwrap_or_default();
        if !is_table || message.body::<u64>()? != 0 {
            abandon_memory(self.userfault.as_ref(), &memory);
            return Err(order_error("SET_MEM_TABLE was answered and then not acknowledged by a u64 of 0"));
        }
        self.memory = memory.clone();
        Ok(memory)
    }

    /// POSTCOPY_END: all pages are there.
    pub(super) fn end(&mut self) -> Result<(), BackendError> {
        let Some(userfault) = self.userfault.take() else {
            return Err(order_error("POSTCOPY_END came without POSTCOPY_ADVISE"));
        };
        for region in std::mem::take(&mut self.memory).regions() {
            if let Err(error) = userfault.unregister(region) {
                limited!(warn, "{error}");
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

/// Frees whoever waits for pages that nobody brings any more. What they wrote there would be wrong wherever the memory is
/// still in use: it goes to blank memory of this process instead.
fn abandon_memory(userfault: Option<&Userfault>, memory: &Memory) {
    let Some(userfault) = userfault else { return };
    for region in memory.regions() {
        debug!("memory at {:#x} is given up: its pages will not come", region.gpa());
        let (start, len) = region.mapped();
        if let Err(error) = region.blank().and_then(|()| userfault.wake(start, len)) {
            limited!(warn, "can't give up memory at {:#x}: {error}", region.gpa());
        }
    }
}

/// The payload of SET_MEM_TABLE with the addresses of this process, as its answer.
pub(super) fn reply_payload(payload: &[u8], memory: &Memory) -> Vec<u8> {
    let (head, regions) = payload.split_at_checked(size_of::<MemoryHeader>()).unwrap_or_default();
    let mut answer = head.to_vec();
    let (descriptions, rest) = regions.as_chunks::<{ size_of::<MemoryRegion>() }>();
    for bytes in descriptions {
        let mut description: MemoryRegion = zerocopy::transmute!(*bytes);
        if let Some(region) = memory.regions().iter().find(|region| region.gpa() == description.guest_phys_addr) {
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
