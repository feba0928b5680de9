//! Receive filter of the driver: receive modes and MAC addresses (virtio 1.2, 5.1.6.5.1 and 5.1.6.5.2).

/// A MAC address.
pub type Mac = [u8; 6];

/// Maximum number of addresses per table. A driver that sets more receives all frames of that kind.
pub(super) const MAX_ADDRESSES: usize = 64;
const BROADCAST: Mac = [0xff; 6];

/// The current modes and addresses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ReceiveFilter {
    /// The driver's own address.
    pub(super) mac: Mac,
    /// Accept every frame.
    pub(super) promiscuous: bool,
    /// Accept every multicast frame.
    pub(super) all_multicast: bool,
    /// Accept every unicast frame.
    pub(super) all_unicast: bool,
    /// Reject multicast frames.
    pub(super) no_multicast: bool,
    /// Reject unicast frames.
    pub(super) no_unicast: bool,
    /// Reject broadcast frames.
    pub(super) no_broadcast: bool,
    /// Further unicast addresses.
    pub(super) unicast: AddressTable,
    /// Multicast addresses.
    pub(super) multicast: AddressTable,
}

/// A table of accepted addresses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum AddressTable {
    /// The listed addresses.
    Listed(Vec<Mac>),
    /// All addresses, because the table was too long.
    All,
}

impl AddressTable {
    /// Creates a table of the given addresses.
    pub(super) fn new(macs: &[Mac]) -> AddressTable {
        if macs.len() > MAX_ADDRESSES { AddressTable::All } else { AddressTable::Listed(macs.to_vec()) }
    }

    fn contains(&self, mac: &Mac) -> bool {
        match self {
            AddressTable::Listed(macs) => macs.contains(mac),
            AddressTable::All => true,
        }
    }
}

impl ReceiveFilter {
    /// Creates a filter that accepts every frame, because the driver may have no control queue, or one that the
    /// front-end does not forward, as with QEMU.
    pub(super) fn new(mac: Mac) -> ReceiveFilter {
        let none = AddressTable::Listed(Vec::new());
        ReceiveFilter {
            mac,
            promiscuous: true,
            all_multicast: false,
            all_unicast: false,
            no_multicast: false,
            no_unicast: false,
            no_broadcast: false,
            unicast: none.clone(),
            multicast: none,
        }
    }

    pub(super) fn set_tables(&mut self, unicast: AddressTable, multicast: AddressTable) {
        (self.unicast, self.multicast) = (unicast, multicast);
    }

    /// Returns true if the driver accepts this frame. A frame with a truncated destination is accepted in promiscuous
    /// mode only.
    pub(super) fn accepts(&self, frame: &[u8]) -> bool {
        if self.promiscuous {
            return true;
        }
        let Some(to) = frame.first_chunk::<6>() else { return false };
        if *to == BROADCAST {
            !self.no_broadcast
        } else if to[0] & 1 != 0 {
            !self.no_multicast && (self.all_multicast || self.multicast.contains(to))
        } else {
            !self.no_unicast && (self.all_unicast || *to == self.mac || self.unicast.contains(to))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: Mac = [2, 0, 0, 0, 0, 1];
    const OTHER: Mac = [2, 0, 0, 0, 0, 2];
    const GROUP: Mac = [1, 0, 0x5e, 0, 0, 1];

    /// Returns true for each accepted destination. The destinations are the driver's own, another, a multicast, the
    /// broadcast, and a truncated address.
    fn wanted(change: impl FnOnce(&mut ReceiveFilter)) -> [bool; 5] {
        let mut filter = ReceiveFilter::new(OWN);
        filter.promiscuous = false;
        change(&mut filter);
        [&OWN[..], &OTHER, &GROUP, &BROADCAST, &OWN[..5]].map(|to| filter.accepts(&[to, &[0; 60]].concat()[..to.len()]))
    }

    #[test]
    fn each_receive_mode_accepts_the_frames_of_the_specification() {
        assert!(ReceiveFilter::new(OWN).accepts(&[]), "everything, at first");
        assert_eq!(wanted(|_| {}), [true, false, false, true, false]);
        assert_eq!(wanted(|f| f.promiscuous = true), [true; 5]);
        assert_eq!(wanted(|f| f.all_multicast = true), [true, false, true, true, false]);
        assert_eq!(wanted(|f| f.all_unicast = true), [true, true, false, true, false]);
        assert_eq!(wanted(|f| (f.all_multicast, f.no_multicast) = (true, true)), [true, false, false, true, false]);
        assert_eq!(wanted(|f| f.no_unicast = true), [false, false, false, true, false]);
        assert_eq!(wanted(|f| f.no_broadcast = true), [true, false, false, false, false]);
        let tables = |f: &mut ReceiveFilter| f.set_tables(AddressTable::new(&[OTHER]), AddressTable::new(&[GROUP]));
        assert_eq!(wanted(tables), [true, true, true, true, false]);
    }

    #[test]
    fn an_address_table_above_the_limit_accepts_every_address() {
        let many = vec![GROUP; MAX_ADDRESSES + 1];
        assert_eq!(AddressTable::new(&many), AddressTable::All);
        assert!(wanted(|f| f.set_tables(AddressTable::new(&many), AddressTable::new(&[])))[1]);
    }
}
