//! Self-describing contents: every 8-byte word of a page or sector follows from its address, its version and a seed.
//!
//! A block's first word is its address (guest-physical, or byte offset on the disk), the second its version, so that a
//! wrong block shows its origin.

use zerocopy::IntoBytes;

use super::error::{ByteLocation, WrongByte};

/// Number of words of a page.
pub(super) const PAGE_WORDS: usize = 512;
/// Number of words of a sector.
pub(super) const SECTOR_WORDS: usize = 64;

/// Generator of the contents that a guest writes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pattern {
    pub(super) seed: u64,
    /// Number of every eight words that are equal in their block.
    pub(super) repeated: u8,
}

impl Pattern {
    /// Fills `words` as version `version` of the block at `address`.
    pub(super) fn fill(&self, address: u64, version: u64, words: &mut [u64]) {
        let key = mix(self.seed ^ mix(address ^ mix(version)));
        let unlike = 8usize.saturating_sub(self.repeated.into());
        let mut next = key;
        for eight in words.chunks_mut(8) {
            for (at, word) in eight.iter_mut().enumerate() {
                next = next.wrapping_add(0x9e37_79b9_7f4a_7c15);
                *word = if at < unlike { next ^ next >> 31 } else { key };
            }
        }
        if let [first, second, ..] = words {
            (*first, *second) = (address, version);
        }
    }

    /// Compares `found`, the block at `address`, with its version `version`; `blank` blocks have a version 0 of zeros.
    /// `place` converts an offset to the location of a wrong byte.
    pub(super) fn check(
        &self,
        address: u64,
        version: u64,
        blank: bool,
        found: &[u64],
        place: impl Fn(u64) -> ByteLocation,
    ) -> Result<(), Box<WrongByte>> {
        let mut expected = [0; PAGE_WORDS];
        let Some(expected) = expected.get_mut(..found.len()) else { return Ok(()) };
        if version != 0 || !blank {
            self.fill(address, version, expected);
        }
        if expected == found {
            return Ok(());
        }
        let mut pairs = expected.as_bytes().iter().zip(found.as_bytes()).zip(0..);
        match pairs.find(|((expected, found), _)| expected != found) {
            Some(((&expected, &byte), at)) => Err(Box::new(WrongByte {
                location: place(at),
                expected,
                found: byte,
                version,
                diagnosis: self.diagnose(found),
            })),
            None => Ok(()),
        }
    }

    /// Returns true if `found` is completely a version of the block at `address`.
    pub(super) fn has_written(&self, address: u64, found: &[u64]) -> bool {
        let [head, version, ..] = found else { return false };
        let mut whole = [0; PAGE_WORDS];
        let whole = whole.get_mut(..found.len()).unwrap_or_default();
        self.fill(*head, *version, whole);
        *head == address && whole == found
    }

    /// Describes a wrong block.
    fn diagnose(&self, found: &[u64]) -> String {
        if found.iter().all(|word| *word == 0) {
            return "all of it is zero".into();
        }
        let (address, version) = match found {
            [address, version, ..] => (*address, *version),
            _ => (0, 0),
        };
        let mut whole = [0; PAGE_WORDS];
        let whole = whole.get_mut(..found.len()).unwrap_or_default();
        self.fill(address, version, whole);
        match whole == found {
            true => format!("it is, as a whole, version {version} of {address:#x}"),
            false => format!("it is a mix of contents, headed version {version} of {address:#x}"),
        }
    }
}

/// Mixes bits (the finalizer of splitmix64).
pub(super) fn mix(value: u64) -> u64 {
    let value = (value ^ value >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ value >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ value >> 31
}

/// A random number generator with one word of state, so that it can be migrated.
#[derive(Clone, Copy, Debug)]
pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// Returns an approximately uniform number below `bound`; 0 if `bound` is 0.
    pub(super) fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(bound)) >> 64) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::GuestAddress;

    const PATTERN: Pattern = Pattern { seed: 7, repeated: 4 };

    fn place(offset: u64) -> ByteLocation {
        ByteLocation::Memory(GuestAddress(offset))
    }

    #[test]
    fn every_flipped_byte_is_found_and_located() {
        let mut page = [0; PAGE_WORDS];
        PATTERN.fill(0x5000, 3, &mut page);
        PATTERN.check(0x5000, 3, false, &page, place).unwrap();
        for byte in 0..4096 {
            let mut bad = page;
            bad.as_mut_bytes()[byte] ^= 0x10;
            let at = |offset| place(0x5000 + offset);
            let wrong = PATTERN.check(0x5000, 3, false, &bad, at).unwrap_err();
            assert_eq!(wrong.location, place(0x5000 + byte as u64));
            assert_eq!(wrong.expected ^ wrong.found, 0x10);
        }
    }

    #[test]
    fn a_stale_or_foreign_block_is_identified() {
        let mut page = [0; PAGE_WORDS];
        PATTERN.fill(0x5000, 2, &mut page);
        let wrong = PATTERN.check(0x5000, 3, false, &page, place).unwrap_err();
        assert!(wrong.to_string().contains("version 2 of 0x5000"), "{wrong}");
        let zero = PATTERN.check(0x5000, 3, false, &[0; PAGE_WORDS], place).unwrap_err();
        assert!(zero.to_string().contains("zero"), "{zero}");
        page[100] += 1;
        let torn = PATTERN.check(0x5000, 2, false, &page, place).unwrap_err();
        assert!(torn.to_string().contains("mix"), "{torn}");
    }

    #[test]
    fn has_written_accepts_only_whole_blocks_at_their_address() {
        let mut sector = [0; SECTOR_WORDS];
        assert!(!PATTERN.has_written(0x200, &sector));
        PATTERN.fill(0x200, 9, &mut sector);
        assert!(PATTERN.has_written(0x200, &sector));
        assert!(!PATTERN.has_written(0x400, &sector));
        assert!(!Pattern { seed: 8, ..PATTERN }.has_written(0x200, &sector));
        sector[63] ^= 1;
        assert!(!PATTERN.has_written(0x200, &sector));
    }

    #[test]
    fn a_blank_block_is_zero_at_version_0() {
        PATTERN.check(0x200, 0, true, &[0; SECTOR_WORDS], place).unwrap();
        assert!(PATTERN.check(0x200, 0, false, &[0; SECTOR_WORDS], place).is_err());
        assert!(PATTERN.check(0x200, 1, true, &[0; SECTOR_WORDS], place).is_err());
    }
}
