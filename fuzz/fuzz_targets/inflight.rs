//! Recovery from whatever bytes an inflight region holds: an error, or a result that makes sense and repeats itself.
//!
//! Input: queue size and used index, then the bytes of one queue's part.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vhost_migrate::inflight::recover;

fuzz_target!(|input: &[u8]| {
    let Some((&[size_low, size_high, used_low, used_high], bytes)) = input.split_first_chunk() else { return };
    let size = u16::from_le_bytes([size_low, size_high]);
    let used_idx = u16::from_le_bytes([used_low, used_high]);
    let Ok(found) = recover(bytes, used_idx, size) else { return };
    let mut heads = found.resubmit.clone();
    heads.sort_unstable();
    heads.dedup();
    assert!(heads.len() == found.resubmit.len() && heads.iter().all(|head| *head < size));
    assert!(found.stores.len() <= 2 * usize::from(size) + 4);
    let mut repaired = bytes.to_vec();
    for stop in 0..=found.stores.len() {
        // Recovery may die after any of its stores; a few of them do for large rings.
        if stop < 8 || stop == found.stores.len() {
            let again = recover(&repaired, used_idx, size).unwrap();
            assert_eq!(again.resubmit, found.resubmit);
        }
        if let Some(store) = found.stores.get(stop) {
            store.to(&mut repaired[..]);
        }
    }
});
