//! Driver settings as part of the device state: receive filter and pairs in use.

use serde::{Deserialize, Serialize};

use super::filter::{AddressTable, MAX_ADDRESSES, Mac, ReceiveFilter};
use super::state::NetState;
use crate::backend::BackendError;
use crate::record;

/// Version of [`SavedNetState`].
const VERSION: u16 = 1;
/// Upper limit for the size of a [`SavedNetState`].
const MAX_BYTES: usize = 4 << 10;

/// The encoded driver settings.
#[derive(Serialize, Deserialize)]
struct SavedNetState {
    mac: Mac,
    promiscuous: bool,
    all_multicast: bool,
    all_unicast: bool,
    no_multicast: bool,
    no_unicast: bool,
    no_broadcast: bool,
    /// `None` if the table was too long: every address of that kind is accepted.
    unicast: Option<Vec<Mac>>,
    multicast: Option<Vec<Mac>>,
    pairs: u16,
    /// The MTU that the driver has read from configuration space.
    mtu: Option<u16>,
}

/// Encodes `state` of a device that reports `mtu` to its driver.
pub(super) fn save(state: &NetState, mtu: Option<u16>) -> Result<Vec<u8>, BackendError> {
    let ReceiveFilter {
        mac,
        promiscuous,
        all_multicast,
        all_unicast,
        no_multicast,
        no_unicast,
        no_broadcast,
        unicast,
        multicast,
    } = state.filter.clone();
    let table = |addresses| match addresses {
        AddressTable::Listed(macs) => Some(macs),
        AddressTable::All => None,
    };
    let saved = SavedNetState {
        mac,
        promiscuous,
        all_multicast,
        all_unicast,
        no_multicast,
        no_unicast,
        no_broadcast,
        unicast: table(unicast),
        multicast: table(multicast),
        pairs: state.pairs_in_use(),
        mtu,
    };
    record::encode(VERSION, &saved).map_err(|error| BackendError::DeviceState { why: error.to_string() })
}

/// Decodes a record and checks it against this device. Returns the filter and the number of pairs in use.
pub(super) fn load(bytes: &[u8], pairs: u16, mtu: Option<u16>) -> Result<(ReceiveFilter, u16), BackendError> {
    let refused = |why: String| BackendError::DeviceState { why };
    let saved: SavedNetState =
        record::decode("net state", VERSION, bytes, MAX_BYTES).map_err(|error| refused(error.to_string()))?;
    if !(1..=pairs).contains(&saved.pairs) {
        return Err(refused(format!("its driver uses {} queue pairs, and this device has {pairs}", saved.pairs)));
    }
    if saved.mtu != mtu {
        let [theirs, ours] = [saved.mtu, mtu].map(|mtu| mtu.map_or("none".into(), |mtu| mtu.to_string()));
        return Err(refused(format!("its driver was told MTU {theirs}, and this device has {ours}")));
    }
    let table = |macs: Option<Vec<Mac>>| match macs {
        Some(macs) if macs.len() > MAX_ADDRESSES => Err(refused(format!("a table of {} addresses", macs.len()))),
        Some(macs) => Ok(AddressTable::Listed(macs)),
        None => Ok(AddressTable::All),
    };
    let filter = ReceiveFilter {
        mac: saved.mac,
        promiscuous: saved.promiscuous,
        all_multicast: saved.all_multicast,
        all_unicast: saved.all_unicast,
        no_multicast: saved.no_multicast,
        no_unicast: saved.no_unicast,
        no_broadcast: saved.no_broadcast,
        unicast: table(saved.unicast)?,
        multicast: table(saved.multicast)?,
    };
    Ok((filter, saved.pairs))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::state::SharedNetState;
    use super::*;

    fn state() -> Arc<NetState> {
        let shared = SharedNetState::new(vec![None, None], ReceiveFilter::new([2, 0, 0, 0, 0, 1]));
        shared.update(|state| {
            let filter = &mut state.filter;
            (filter.promiscuous, filter.all_multicast, filter.no_broadcast) = (false, true, true);
            filter.set_tables(AddressTable::new(&[[2, 0, 0, 0, 0, 9]; 3]), AddressTable::All);
            state.driver_pairs = Some(2);
        });
        shared.state()
    }

    #[test]
    fn saved_driver_settings_are_restored() {
        let state = state();
        let bytes = save(&state, Some(1400)).unwrap();
        assert_eq!(load(&bytes, 4, Some(1400)).unwrap(), (state.filter.clone(), 2));
        for flag in 0..6 {
            let mut bytes = bytes.clone();
            bytes[2 + 6 + flag] ^= 1;
            assert_ne!(load(&bytes, 4, Some(1400)).unwrap().0, state.filter, "flag {flag}");
        }
    }

    #[test]
    fn a_saved_state_that_does_not_fit_the_device_is_refused() {
        let bytes = save(&state(), Some(1400)).unwrap();
        assert!(load(&bytes, 1, Some(1400)).is_err(), "fewer pairs than the driver uses");
        assert!(load(&bytes, 2, None).is_err(), "another MTU than the driver was told");
        assert!(load(&bytes[..bytes.len() - 1], 2, Some(1400)).is_err());
        let full = |count| {
            let shared = SharedNetState::new(vec![None], ReceiveFilter::new([2; 6]));
            shared
                .update(|state| state.filter.set_tables(AddressTable::Listed(vec![[2; 6]; count]), AddressTable::All));
            load(&save(&shared.state(), None).unwrap(), 1, None)
        };
        assert!(full(MAX_ADDRESSES).is_ok());
        assert!(full(MAX_ADDRESSES + 1).is_err());
    }
}
