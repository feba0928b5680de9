//! What the driver has set, as it travels with the device: the filter, the pairs in use.

use serde::{Deserialize, Serialize};

use super::filter::{Addresses, Filter, MAX_ADDRESSES, Mac};
use super::state::State;
use crate::backend::BackendError;
use crate::stream::record;

/// Version of [`Saved`].
const VERSION: u16 = 1;
/// More bytes than the largest [`Saved`] has.
const MAX_BYTES: usize = 4 << 10;

/// The record.
#[derive(Serialize, Deserialize)]
struct Saved {
    mac: Mac,
    promiscuous: bool,
    all_multicast: bool,
    all_unicast: bool,
    no_multicast: bool,
    no_unicast: bool,
    no_broadcast: bool,
    /// `None`: more than fit, so all.
    unicast: Option<Vec<Mac>>,
    multicast: Option<Vec<Mac>>,
    pairs: u16,
    /// What the driver was told when it read configuration space.
    mtu: Option<u16>,
}

/// The record of `state`, for a device whose driver was told `mtu`.
pub(super) fn save(state: &State, mtu: Option<u16>) -> Result<Vec<u8>, BackendError> {
    let Filter {
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
        Addresses::These(macs) => Some(macs),
        Addresses::All => None,
    };
    let saved = Saved {
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

/// What a record says, checked against this device: filter, pairs in use.
pub(super) fn load(bytes: &[u8], pairs: u16, mtu: Option<u16>) -> Result<(Filter, u16), BackendError> {
    let refused = |why: String| BackendError::DeviceState { why };
    let saved: Saved =
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
        Some(macs) => Ok(Addresses::These(macs)),
        None => Ok(Addresses::All),
    };
    let filter = Filter {
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

    use super::super::state::Hub;
    use super::*;

    fn state() -> Arc<State> {
        let hub = Hub::new(vec![None, None], Filter::new([2, 0, 0, 0, 0, 1]));
        hub.change(|state| {
            let filter = &mut state.filter;
            (filter.promiscuous, filter.all_multicast, filter.no_broadcast) = (false, true, true);
            filter.set_tables(Addresses::new(&[[2, 0, 0, 0, 0, 9]; 3]), Addresses::All);
            state.pairs = Some(2);
        });
        hub.state()
    }

    #[test]
    fn everything_the_driver_has_set_comes_back() {
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
    fn what_does_not_fit_the_device_is_refused() {
        let bytes = save(&state(), Some(1400)).unwrap();
        assert!(load(&bytes, 1, Some(1400)).is_err(), "fewer pairs than the driver uses");
        assert!(load(&bytes, 2, None).is_err(), "another MTU than the driver was told");
        assert!(load(&bytes[..bytes.len() - 1], 2, Some(1400)).is_err());
        let full = |count| {
            let hub = Hub::new(vec![None], Filter::new([2; 6]));
            hub.change(|state| state.filter.set_tables(Addresses::These(vec![[2; 6]; count]), Addresses::All));
            load(&save(&hub.state(), None).unwrap(), 1, None)
        };
        assert!(full(MAX_ADDRESSES).is_ok());
        assert!(full(MAX_ADDRESSES + 1).is_err());
    }
}
