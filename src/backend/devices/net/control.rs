//! The control queue: receive modes, MAC addresses, queue pairs, announcements (virtio 1.2, 5.1.6.5).
//!
//! A command is a class, a number and readable data, and one writable byte for its result. QEMU does not forward the
//! control queue.

use std::sync::Arc;

use tracing::debug;
use zerocopy::FromBytes;
use zerocopy::little_endian::{U16, U32};

use super::filter::{AddressTable, Mac, ReceiveFilter};
use super::state::SharedNetState;
use crate::abi::virtio::{
    NetCtrlHeader, VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK, VIRTIO_NET_CTRL_MAC,
    VIRTIO_NET_CTRL_MAC_ADDR_SET, VIRTIO_NET_CTRL_MAC_TABLE_SET, VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET,
    VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_RX_ALLMULTI, VIRTIO_NET_CTRL_RX_ALLUNI, VIRTIO_NET_CTRL_RX_NOBCAST,
    VIRTIO_NET_CTRL_RX_NOMULTI, VIRTIO_NET_CTRL_RX_NOUNI, VIRTIO_NET_CTRL_RX_PROMISC, VIRTIO_NET_ERR,
    VIRTIO_NET_F_CTRL_MAC_ADDR, VIRTIO_NET_F_CTRL_RX, VIRTIO_NET_F_CTRL_RX_EXTRA, VIRTIO_NET_F_GUEST_ANNOUNCE,
    VIRTIO_NET_F_MQ, VIRTIO_NET_OK, VirtioFeatures,
};
use crate::backend::Request;

/// Maximum size of a command in bytes: two tables of some thousand addresses.
const MAX_COMMAND: u64 = 64 << 10;

pub(super) struct ControlQueue {
    shared: Arc<SharedNetState>,
    /// Number of pairs of the device.
    pairs: u16,
    features: VirtioFeatures,
}

impl ControlQueue {
    pub(super) fn new(shared: Arc<SharedNetState>, pairs: u16, features: VirtioFeatures) -> ControlQueue {
        shared.update(|state| state.control_queue_ran = true);
        ControlQueue { shared, pairs, features }
    }

    /// Executes a command and writes its result.
    pub(super) fn serve(&self, request: &mut Request) {
        let answer = match self.execute(request) {
            Some(()) => VIRTIO_NET_OK,
            None => {
                debug!("control queue: a command of {} bytes is refused", request.readable_len());
                VIRTIO_NET_ERR
            }
        };
        match request.writable_len().checked_sub(1).map(|last| request.write(last, &[answer])) {
            Some(Ok(())) => {}
            _ => debug!("control queue: a command without room for its answer"),
        }
    }

    /// Executes a command. Returns `None` if it fails.
    fn execute(&self, request: &Request) -> Option<()> {
        let len = request.readable_len();
        if len > MAX_COMMAND {
            return None;
        }
        let mut bytes = vec![0; len as usize];
        request.read(0, &mut bytes).ok()?;
        let (NetCtrlHeader { class, cmd }, data) = NetCtrlHeader::read_from_prefix(&bytes).ok()?;
        let negotiated = |feature| self.features.contains(feature).then_some(());
        match (class, cmd) {
            (VIRTIO_NET_CTRL_RX, mode) => {
                let basic = matches!(mode, VIRTIO_NET_CTRL_RX_PROMISC | VIRTIO_NET_CTRL_RX_ALLMULTI);
                negotiated(if basic { VIRTIO_NET_F_CTRL_RX } else { VIRTIO_NET_F_CTRL_RX_EXTRA })?;
                let switch: fn(&mut ReceiveFilter) -> &mut bool = match mode {
                    VIRTIO_NET_CTRL_RX_PROMISC => |filter| &mut filter.promiscuous,
                    VIRTIO_NET_CTRL_RX_ALLMULTI => |filter| &mut filter.all_multicast,
                    VIRTIO_NET_CTRL_RX_ALLUNI => |filter| &mut filter.all_unicast,
                    VIRTIO_NET_CTRL_RX_NOMULTI => |filter| &mut filter.no_multicast,
                    VIRTIO_NET_CTRL_RX_NOUNI => |filter| &mut filter.no_unicast,
                    VIRTIO_NET_CTRL_RX_NOBCAST => |filter| &mut filter.no_broadcast,
                    _ => return None,
                };
                let [on] = data else { return None };
                self.shared.update(|state| *switch(&mut state.filter) = *on != 0);
            }
            (VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_ADDR_SET) => {
                negotiated(VIRTIO_NET_F_CTRL_MAC_ADDR)?;
                let mac = Mac::try_from(data).ok()?;
                self.shared.update(|state| state.filter.mac = mac);
            }
            (VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_TABLE_SET) => {
                negotiated(VIRTIO_NET_F_CTRL_RX)?;
                let (unicast, rest) = split_table(data)?;
                let (multicast, rest) = split_table(rest)?;
                rest.is_empty().then_some(())?;
                self.shared.update(|state| state.filter.set_tables(unicast, multicast));
            }
            (VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK) => {
                negotiated(VIRTIO_NET_F_GUEST_ANNOUNCE)?;
                self.shared.update(|state| state.must_announce = false);
            }
            (VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET) => {
                negotiated(VIRTIO_NET_F_MQ)?;
                let pairs = U16::read_from_bytes(data).ok()?.get();
                (1..=self.pairs).contains(&pairs).then_some(())?;
                self.shared.update(|state| state.driver_pairs = Some(pairs));
            }
            _ => return None,
        }
        Some(())
    }
}

/// Decodes an address table. Returns it and the rest of the data.
fn split_table(data: &[u8]) -> Option<(AddressTable, &[u8])> {
    let (count, rest) = U32::read_from_prefix(data).ok()?;
    let bytes = usize::try_from(count.get()).ok()?.checked_mul(size_of::<Mac>())?;
    let (macs, rest) = rest.split_at_checked(bytes)?;
    let (macs, _) = macs.as_chunks();
    Some((AddressTable::new(macs), rest))
}
