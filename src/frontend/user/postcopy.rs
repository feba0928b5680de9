//! Postcopy: the guest runs at the destination before its memory is there, and the back-end says which pages it waits for
//! (rule P1).
#![forbid(unsafe_code)]

use zerocopy::IntoBytes;

use super::UserDevice;
use super::payload::memory_table;
use crate::abi::bit;
use crate::abi::vhost_user::{MemoryHeader, MemoryRegion, Request, protocol_feature};
use crate::frontend::FrontendError;
use crate::memory::{Memory, Userfault};

/// Where a back-end has guest memory in its own address space, in which it waits for pages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackendAddresses(Vec<MemoryRegion>);

impl BackendAddresses {
    /// The guest-physical address of an address in the back-end.
    pub fn gpa(&self, address: u64) -> Option<u64> {
        let within = |region: &&MemoryRegion| {
            address.checked_sub(region.userspace_addr).is_some_and(|offset| offset < region.memory_size)
        };
        let region = self.0.iter().find(within)?;
        region.guest_phys_addr.checked_add(address - region.userspace_addr)
    }

    /// The address in the back-end of a guest-physical address.
    pub fn address(&self, gpa: u64) -> Option<u64> {
        let within = |region: &&MemoryRegion| {
            gpa.checked_sub(region.guest_phys_addr).is_some_and(|offset| offset < region.memory_size)
        };
        let region = self.0.iter().find(within)?;
        region.userspace_addr.checked_add(gpa - region.guest_phys_addr)
    }
}

/// Postcopy, in this order; the memory is complete before the end.
impl UserDevice {
    /// Announces postcopy. What comes back tells which addresses the back-end waits for, and wakes it.
    ///
    /// # Errors
    /// [`FrontendError::NotOffered`] if the back-end can't; the channel's errors.
    pub fn postcopy_advise(&mut self) -> Result<Userfault, FrontendError> {
        let advice = "start it with --postcopy; our own back-end says why it can't in its log";
        self.require(protocol_feature::PAGEFAULT, "PAGEFAULT", advice)?;
        let mut reply = self.connection.request(Request::POSTCOPY_ADVISE, &[], &[])?;
        let fd = reply.fds.pop().ok_or(FrontendError::NotOffered { what: "a userfaultfd".into(), advice })?;
        Ok(Userfault::from_fd(fd))
    }

    /// Says that memory tables from now on are not complete. No ring may run.
    ///
    /// # Errors
    /// [`FrontendError::Refused`]; the channel's errors.
    pub fn postcopy_listen(&mut self) -> Result<(), FrontendError> {
        self.postcopy_ask(Request::POSTCOPY_LISTEN)
    }

    /// As [`set_memory`](crate::frontend::Device::set_memory), with memory that is not complete. `ready` is told where the
    /// back-end has it; when that returns, faults must be served, for the back-end goes on.
    ///
    /// # Errors
    /// As `set_memory`, and [`FrontendError::ProtocolViolation`] for an answer about other regions.
    pub fn postcopy_set_memory(
        &mut self,
        memory: &Memory,
        ready: impl FnOnce(BackendAddresses),
    ) -> Result<(), FrontendError> {
        let request = Request::SET_MEM_TABLE;
        let (payload, fds) = memory_table(memory)?;
        let reply = self.connection.request(request, &payload, &fds)?;
        let ours = addresses(&payload);
        let theirs = Some(addresses(&reply.payload)).filter(|_| reply.payload.len() == payload.len());
        let key = |region: &MemoryRegion| (region.guest_phys_addr, region.memory_size);
        let same = |theirs: &Vec<MemoryRegion>| theirs.iter().map(key).eq(ours.iter().map(key));
        let Some(theirs) = theirs.filter(same) else {
            self.connection.close();
            let what = format!("{} bytes that are not the regions it was told of", reply.payload.len());
            return Err(FrontendError::ProtocolViolation { request, what, rule: "P1.4" });
        };
        self.memory = memory.clone();
        self.set_translation_memory(Some(memory));
        ready(BackendAddresses(theirs));
        self.connection.send_without_reply(request, 0u64.as_bytes())
    }

    /// All pages are there.
    ///
    /// # Errors
    /// [`FrontendError::Refused`]; the channel's errors.
    pub fn postcopy_end(&mut self) -> Result<(), FrontendError> {
        self.postcopy_ask(Request::POSTCOPY_END)
    }

    fn postcopy_ask(&mut self, request: Request) -> Result<(), FrontendError> {
        if self.negotiated.protocol & bit(protocol_feature::PAGEFAULT) == 0 {
            return Err(FrontendError::NotOffered { what: "PAGEFAULT".into(), advice: "start it with --postcopy" });
        }
        // DPDK answers LISTEN only where need-reply asks for it, libvhost-user in any case, and once.
        if self.connection.acks {
            self.connection.send(request, &[], &[])?;
            return self.connection.wait_for_acks();
        }
        match self
            .connection
            .request(request, &[], &[])?
            .read::<u64>("P1.3")
            .inspect_err(|_| self.connection.close())?
        {
            0 => Ok(()),
            code => Err(FrontendError::Refused { request, code }),
        }
    }
}

/// The regions of a SET_MEM_TABLE.
fn addresses(payload: &[u8]) -> Vec<MemoryRegion> {
    let regions = payload.get(size_of::<MemoryHeader>()..).unwrap_or_default();
    let (regions, _) = regions.as_chunks::<{ size_of::<MemoryRegion>() }>();
    regions.iter().map(|bytes| zerocopy::transmute!(*bytes)).collect()
}
