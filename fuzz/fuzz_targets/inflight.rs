//! Recovery from any bytes of an inflight region: an error, or a valid result that a second recovery repeats.
//!
//! Input: queue size, used index, and the flags of a packed ring's descriptors, then the bytes of one queue's part.
//! They are read as the part of a split and of a packed ring.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vhost_migrate::inflight::{Store, recover_packed, recover_split};
use vhost_migrate::ring::RingBase;

fuzz_target!(|input: &[u8]| {
    let Some((&[size_low, size_high, used_low, used_high, flags], bytes)) = input.split_first_chunk() else { return };
    let size = u16::from_le_bytes([size_low, size_high]);
    let used_idx = u16::from_le_bytes([used_low, used_high]);
    split(bytes, size, used_idx);
    packed(bytes, size, RingBase::from_bits(u32::from(used_idx) << 16), |index| {
        let bits = flags.rotate_left(index.into());
        u16::from(bits & 1) << 7 | u16::from(bits & 2) << 14
    });
});

fn split(bytes: &[u8], size: u16, used_idx: u16) {
    let Ok(found) = recover_split(bytes, used_idx, size) else { return };
    let mut heads = found.resubmit.clone();
    heads.sort_unstable();
    heads.dedup();
    assert!(heads.len() == found.resubmit.len() && heads.iter().all(|head| *head < size));
    assert!(found.stores.len() <= 2 * usize::from(size) + 4);
    killed(bytes, &found.stores, |repaired| {
        assert_eq!(recover_split(repaired, used_idx, size).unwrap().resubmit, found.resubmit)
    });
}

fn packed(bytes: &[u8], size: u16, base: RingBase, flags_of: impl Fn(u16) -> u16 + Copy) {
    let Ok(found) = recover_packed(bytes, size, size, base, flags_of) else { return };
    assert!(found.resubmit.iter().map(|request| request.descs.len()).sum::<usize>() <= size.into());
    assert!(found.stores.len() <= 3 * usize::from(size) + 8);
    killed(bytes, &found.stores, |repaired| {
        let again = recover_packed(repaired, size, size, base, flags_of).unwrap();
        assert_eq!(again.resubmit, found.resubmit);
        assert!(found.base.is_none() || (again.base, &again.stale) == (found.base, &found.stale));
    });
}

/// Recovers again after a crash between the stores of a recovery. Of a large ring only a few stores are tried.
fn killed(bytes: &[u8], stores: &[Store], again: impl Fn(&[u8])) {
    let mut repaired = bytes.to_vec();
    for stop in 0..=stores.len() {
        if stop < 8 || stop == stores.len() {
            again(&repaired);
        }
        if let Some(store) = stores.get(stop) {
            store.to(&mut repaired[..]);
        }
    }
}
