//! What a back-end can do wrong behind an IOMMU (rules T1 to T4, L5): messages about translations that are not what was
//! said, and rings that heed them too little or too much.

use std::collections::BTreeMap;
use std::thread;
use std::time::{Duration, Instant};

use vhost_migrate::abi::vhost::{VHOST_ACCESS_RW, VHOST_IOTLB_INVALIDATE, VHOST_IOTLB_UPDATE};
use vhost_migrate::abi::vhost_user::{Header, IotlbMsg, MemoryRegion, Request as Code};
use vhost_migrate::backend::{VhostUserMessage, VringConfig};
use vhost_migrate::memory::{Access, IovaWindow, LOG_PAGE};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

/// Where data begins.
const DATA: u64 = 1 << 32;
/// Bytes that a ring is taken to lie in.
const ROOM: u64 = 64 << 10;
/// How long a stop waits: longer than the check does.
const LONG: Duration = Duration::from_millis(4500);

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum IommuFault {
    /// Addresses of data are taken for guest-physical.
    SkipsTranslation,
    /// What lies side by side for the driver is taken to do so in memory.
    AssumesContiguous,
    /// What is not permitted ends the connection.
    HangsUpOnDenial,
    /// GET_VRING_BASE is answered when all requests are complete, those that can't be made too.
    BaseWaitsForMisses,
    /// What can't be a translation ends the connection.
    HangsUpOnInvalid,
    /// What can't be a translation is acknowledged.
    AcknowledgesInvalid,
    /// An invalidation is acknowledged, and that is all.
    IgnoresInvalidation,
    /// An invalidation does not wait for requests in flight.
    InvalidatesTooEarly,
    /// Data is marked by its I/O virtual pages.
    MarksIova,
}

/// What was said of memory and translations.
#[derive(Default)]
pub(crate) struct Translations {
    regions: Vec<MemoryRegion>,
    /// The first page of each room, and its address in the front-end.
    firsts: BTreeMap<u64, (u64, u64)>,
    /// I/O virtual pages, by guest-physical ones.
    pages: BTreeMap<u64, u64>,
}

impl Translations {
    /// Makes something else of a message; false if it ends the connection.
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
            // What is refused by design is asked for with need-reply, and no other update is.
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

    /// The page that a mark is set for.
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

/// Waits until a split ring has nothing that is not complete.
pub(crate) fn wait_for_all(setup: &VringConfig) {
    let [_, avail, used] = setup.layout.areas();
    let index = |area: u64| {
        let iotlb = setup.iotlb.as_ref()?;
        let window = IovaWindow::open(&setup.memory, iotlb, &[(area, 4, Access::Read)], None).ok()?;
        let mut index = [0; 2];
        window.memory().read(area + 2, &mut index).ok()?;
        Some(index)
    };
    let deadline = Instant::now() + LONG;
    while index(avail) != index(used) && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(1));
    }
}
