//! Postcopy: the guest runs at the destination before its memory has arrived, and the back-end reports the pages that
//! it waits for (rule P1).
#![forbid(unsafe_code)]

use zerocopy::IntoBytes;

use super::UserDevice;
use super::payload::memory_table;
use crate::abi::vhost_user::{FrontendRequest, MemoryHeader, MemoryRegion, ProtocolFeatures};
use crate::frontend::FrontendError;
use crate::memory::{FaultAddress, GuestAddress, Memory, Userfault};

/// Addresses at which a back-end has mapped guest memory, as reported in page faults.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackendAddresses(Vec<MemoryRegion>);

impl BackendAddresses {
    /// Returns the guest-physical address of a back-end address.
    pub fn gpa(&self, address: FaultAddress) -> Option<GuestAddress> {
        let translate = |region: &MemoryRegion| {
            let offset = address.0.checked_sub(region.userspace_addr).filter(|offset| *offset < region.memory_size)?;
            region.guest_phys_addr.checked_add(offset).map(GuestAddress)
        };
        self.0.iter().find_map(translate)
    }

    /// Returns the back-end address of a guest-physical address.
    pub fn address(&self, gpa: GuestAddress) -> Option<FaultAddress> {
        let translate = |region: &MemoryRegion| {
            let offset = gpa.0.checked_sub(region.guest_phys_addr).filter(|offset| *offset < region.memory_size)?;
            region.userspace_addr.checked_add(offset).map(FaultAddress)
        };
        self.0.iter().find_map(translate)
    }
}

/// Postcopy calls, in the order of use. All pages must have arrived before the last one.
impl UserDevice {
    /// Announces postcopy. The returned userfaultfd reports the back-end's page faults and places pages.
    ///
    /// # Errors
    /// [`FrontendError::NotOffered`] if the back-end does not support it; errors of the connection.
    pub fn postcopy_advise(&mut self) -> Result<Userfault, FrontendError> {
        let advice = "start the back-end with --postcopy; the log of this project's back-end has the reason";
        self.require(ProtocolFeatures::PAGEFAULT, "PAGEFAULT", advice)?;
        let mut reply = self.connection.request(FrontendRequest::POSTCOPY_ADVISE, &[], &[])?;
        let fd = reply.fds.pop().ok_or(FrontendError::NotOffered { what: "a userfaultfd".into(), advice })?;
        Ok(Userfault::from_fd(fd))
    }

    /// Announces that later memory tables are incomplete. No ring may run.
    ///
    /// # Errors
    /// [`FrontendError::Refused`]; errors of the connection.
    pub fn postcopy_listen(&mut self) -> Result<(), FrontendError> {
        self.postcopy_ask(FrontendRequest::POSTCOPY_LISTEN)
    }

    /// Like [`set_memory`](crate::frontend::Device::set_memory), for incomplete memory. Calls `ready` with the
    /// back-end's addresses. Faults must be served when `ready` returns, because the back-end then continues.
    ///
    /// # Errors
    /// As `set_memory`; [`FrontendError::ProtocolViolation`] for a reply with other regions.
    pub fn postcopy_set_memory(
        &mut self,
        memory: &Memory,
        ready: impl FnOnce(BackendAddresses),
    ) -> Result<(), FrontendError> {
        let request = FrontendRequest::SET_MEM_TABLE;
        let (payload, fds) = memory_table(memory)?;
        let reply = self.connection.request(request, &payload, &fds)?;
        let ours = addresses(&payload);
        let theirs = Some(addresses(&reply.payload)).filter(|_| reply.payload.len() == payload.len());
        let key = |region: &MemoryRegion| (region.guest_phys_addr, region.memory_size);
        let same = |theirs: &Vec<MemoryRegion>| theirs.iter().map(key).eq(ours.iter().map(key));
        let Some(theirs) = theirs.filter(same) else {
            self.connection.close();
            let what = format!("a reply of {} bytes with other regions than those sent", reply.payload.len());
            return Err(FrontendError::ProtocolViolation { request, what, rule: "P1.4" });
        };
        self.memory = memory.clone();
        self.set_translation_memory(Some(memory));
        ready(BackendAddresses(theirs));
        self.connection.send_without_reply(request, 0u64.as_bytes())
    }

    /// Ends postcopy: all pages have arrived.
    ///
    /// # Errors
    /// [`FrontendError::Refused`]; errors of the connection.
    pub fn postcopy_end(&mut self) -> Result<(), FrontendError> {
        self.postcopy_ask(FrontendRequest::POSTCOPY_END)
    }

    fn postcopy_ask(&mut self, request: FrontendRequest) -> Result<(), FrontendError> {
        if !self.negotiated.protocol.contains(ProtocolFeatures::PAGEFAULT) {
            return Err(FrontendError::NotOffered {
                what: "PAGEFAULT".into(),
                advice: "start the back-end with --postcopy",
            });
        }
        // DPDK replies to LISTEN only with need-reply, libvhost-user always, and once.
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

/// Parses the regions of a SET_MEM_TABLE payload.
fn addresses(payload: &[u8]) -> Vec<MemoryRegion> {
    let regions = payload.get(size_of::<MemoryHeader>()..).unwrap_or_default();
    let (regions, _) = regions.as_chunks::<{ size_of::<MemoryRegion>() }>();
    regions.iter().map(|bytes| zerocopy::transmute!(*bytes)).collect()
}
