//! Faults behind an IOMMU (rules T1 to T4, L5): changed IOTLB messages, and invalidations that are ignored or too
//! early.

use std::collections::BTreeMap;
use std::thread;
use std::time::{Duration, Instant};

use vhost_migrate::abi::vhost::{VHOST_ACCESS_RW, VHOST_IOTLB_INVALIDATE, VHOST_IOTLB_UPDATE};
use vhost_migrate::abi::vhost_user::{FrontendRequest as Code, Header, IotlbMsg, MemoryRegion};
use vhost_migrate::memory::{Access, Address, GuestAddress, Iova, IovaWindow, LOG_PAGE};
use vhost_migrate::unstable::backend::{VhostUserMessage, VringConfig};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

/// Start of the data region.
const DATA: u64 = 1 << 32;
/// Size of the range that is assumed to hold one ring.
const ROOM: u64 = 64 << 10;
/// Time that a stop waits; longer than the check does.
const LONG: Duration = Duration::from_millis(4500);

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum IommuFault {
    /// Uses data addresses as guest-physical.
    SkipsTranslation,
    /// Assumes that contiguous addresses of the driver are contiguous in memory.
    AssumesContiguous,
    /// Closes the connection at a denied access.
    HangsUpOnDenial,
    /// Replies to GET_VRING_BASE only after all requests, also those without translation.
    BaseWaitsForMisses,
    /// Closes the connection at an invalid IOTLB message.
    HangsUpOnInvalid,
    /// Acknowledges invalid IOTLB messages.
    AcknowledgesInvalid,
    /// Acknowledges invalidations and ignores them.
    IgnoresInvalidation,
    /// Does not wait for requests in flight at an invalidation.
    InvalidatesTooEarly,
    /// Marks data by I/O virtual page.
    MarksIova,
}

/// Memory and translations that the back-end has received.
#[derive(Default)]
pub(crate) struct Translations {
    regions: Vec<MemoryRegion>,
    /// First page of each ring range, and its user address.
    firsts: BTreeMap<u64, (u64, u64)>,
    /// I/O virtual pages, by guest-physical page.
    pages: BTreeMap<u64, u64>,
}

impl Translations {
    /// Changes a message. Returns false if the connection is to be closed.
    pub(crate) fn fault(&mut self, fault: IommuFault, message: &mut VhostUserMessage) -> bool {
        if message.code == Code::SET_MEM_TABLE {
            let table = message.payload[8..].chunks_exact(size_of::<MemoryRegion>());
            self.regions = table.map(|bytes| MemoryRegion::read_from_bytes(bytes).unwrap()).collect();
        }
        if message.code != Code::IOTLB_MSG {
            return true;
        }
        let Ok(mut said) = IotlbMsg::read_from_bytes(&message.payload) else { return true };
        let asks = message.flags & Header::FLAG_NEED_REPLY != 0;
        let harmless = IotlbMsg { iova: 1 << 60, size: 1, kind: VHOST_IOTLB_INVALIDATE, ..IotlbMsg::new_zeroed() };
        match (fault, said.kind) {
            (IommuFault::SkipsTranslation, VHOST_IOTLB_UPDATE) if said.iova >= DATA => {
                said.uaddr = self.user(said.iova)
            }
            (IommuFault::AssumesContiguous, VHOST_IOTLB_UPDATE) if said.iova < DATA => {
                let (iova, uaddr) = *self.firsts.entry(said.iova / ROOM).or_insert((said.iova, said.uaddr));
                said.uaddr = uaddr.wrapping_add(said.iova).wrapping_sub(iova);
            }
            (IommuFault::AssumesContiguous, VHOST_IOTLB_INVALIDATE) => self.firsts.clear(),
            (IommuFault::HangsUpOnDenial, VHOST_IOTLB_UPDATE) => return said.perm == VHOST_ACCESS_RW,
            // Of all updates only the invalid ones have need-reply.
            (IommuFault::AcknowledgesInvalid, VHOST_IOTLB_INVALIDATE) if said.size == 0 || said.size == u64::MAX => {
                said = harmless
            }
            (IommuFault::AcknowledgesInvalid, VHOST_IOTLB_INVALIDATE) => {}
            (IommuFault::AcknowledgesInvalid, _) if asks => said = harmless,
            (IommuFault::IgnoresInvalidation, VHOST_IOTLB_INVALIDATE) => said = harmless,
            (IommuFault::MarksIova, VHOST_IOTLB_UPDATE) => {
                self.pages.insert(self.gpa(said.uaddr) / LOG_PAGE, said.iova / LOG_PAGE);
            }
            _ => {}
        }
        message.payload = said.as_bytes().to_vec();
        true
    }

    /// Returns the page that is marked for a page.
    pub(crate) fn marked(&self, page: u64) -> u64 {
        self.pages.get(&page).copied().unwrap_or(page)
    }

    fn user(&self, gpa: u64) -> u64 {
        let region = self.regions.iter().rfind(|region| region.guest_phys_addr <= gpa).unwrap();
        region.userspace_addr + (gpa - region.guest_phys_addr)
    }

    fn gpa(&self, user: u64) -> u64 {
        let inside = |region: &&MemoryRegion| user.wrapping_sub(region.userspace_addr) < region.memory_size;
        let region = self.regions.iter().find(inside).unwrap();
        region.guest_phys_addr + (user - region.userspace_addr)
    }
}

/// Waits until a split ring has no incomplete request.
pub(crate) fn wait_for_all(setup: &VringConfig) {
    let [_, avail, used] = setup.layout.areas();
    let index = |area: GuestAddress| {
        let iotlb = setup.iotlb.as_ref()?;
        let window = IovaWindow::open(&setup.memory, iotlb, &[(Iova(area.0), 4, Access::Read)], None).ok()?;
        let mut index = [0; 2];
        window.memory().read(area.unchecked_add(2), &mut index).ok()?;
        Some(index)
    };
    let deadline = Instant::now() + LONG;
    while index(avail) != index(used) && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(1));
    }
}
