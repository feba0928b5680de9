//! The position of a packed ring, deduced from its descriptors alone, for front-ends that have lost the base
//! (rules I12.2 to I12.4).
//!
//! A drained ring in which every request has one descriptor consists of four runs. `w` is the wrap counter of the
//! round:
//!
//! | descriptors | avail bit | used bit |
//! |---|---|---|
//! | made available again, for the next round | `!w` | `w` |
//! | used in this round | `w` | `w` |
//! | available in this round | `w` | `!w` |
//! | used in the previous round, or never | `!w` | `!w` |
//!
//! The position is the beginning of the third run. A used chain of several descriptors keeps the driver's flags in all
//! but the first of them. If the ring may contain one, the position cannot be deduced.

use super::{AVAIL, Position, USED};
use crate::abi::virtio::{DESC_F_NEXT, PackedDesc};

/// The position of the ring of these descriptors, if only one is possible.
pub(super) fn used_position(descs: &[PackedDesc]) -> Option<Position> {
    let bits: Vec<(bool, bool)> = descs.iter().map(bits).collect();
    let &(_, first) = bits.first()?;
    let (index, wrap) = match bits.iter().position(|(_, used)| *used != first) {
        Some(index) => (index, first),
        None => (0, !first),
    };
    let (before, after) = bits.split_at_checked(index)?;
    let again = before.iter().take_while(|(avail, _)| *avail != wrap).count();
    let available = after.iter().take_while(|(avail, _)| *avail == wrap).count();
    let is_regular = before.iter().skip(again).all(|(avail, _)| *avail == wrap)
        && after.iter().skip(available).all(|(avail, _)| *avail != wrap)
        && after.iter().all(|(_, used)| *used != wrap)
        && (again == 0 || available == after.len());
    let position = Position { index: index as u16, wrap };
    let chains = descs.iter().any(|desc| desc.flags.get() & DESC_F_NEXT != 0);
    let is_certain = is_regular && (position == Position::START || !chains) && !may_be_rest_of_chain(descs, position);
    is_certain.then_some(position)
}

/// Returns true if all fields of the descriptor are 0, as before a driver has written it.
pub(super) fn is_blank(desc: &PackedDesc) -> bool {
    (desc.addr.get(), desc.len.get(), desc.id.get(), desc.flags.get()) == (0, 0, 0, 0)
}

/// Returns true if the descriptors show that `used` is not the used position. They show nothing if no driver has
/// written the descriptors before it.
pub(super) fn contradicts(descs: &[PackedDesc], used: Position) -> bool {
    let Some((before, after)) = descs.split_at_checked(used.index.into()) else { return true };
    let is_unwritten = before.iter().all(is_blank);
    let in_round_before = |desc: &PackedDesc| bits(desc) == (!used.wrap, !used.wrap);
    !is_unwritten && before.iter().any(in_round_before) || after.iter().any(|desc| bits(desc) == (used.wrap, used.wrap))
}

/// Returns true if the available descriptors at `position` may be the rest of a used chain, which has the same buffer
/// id.
fn may_be_rest_of_chain(descs: &[PackedDesc], position: Position) -> bool {
    let before = position.before(1, descs.len() as u16);
    let (Some(last), Some(rest)) =
        (descs.get(usize::from(before.index)), descs.get(usize::from(position.index)..).and_then(end_of_chain))
    else {
        return false;
    };
    let is_used = bits(last) == (before.wrap, before.wrap) && (last.addr.get(), last.len.get()) != (0, 0);
    is_used && bits(rest) == (position.wrap, !position.wrap) && last.id == rest.id
}

/// The last descriptor of the chain that begins `descs`.
fn end_of_chain(descs: &[PackedDesc]) -> Option<&PackedDesc> {
    descs.iter().find(|desc| desc.flags.get() & DESC_F_NEXT == 0)
}

/// The AVAIL bit and the USED bit.
fn bits(desc: &PackedDesc) -> (bool, bool) {
    (desc.flags.get() & AVAIL != 0, desc.flags.get() & USED != 0)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
mod tests {
    use super::*;
    use zerocopy::FromZeros;

    /// A ring of `size` descriptors after `used` requests of one descriptor, all completed and taken by the driver,
    /// with `available` more.
    fn ring(size: u16, used: u32, available: u32) -> Vec<PackedDesc> {
        let mut descs = vec![PackedDesc::new_zeroed(); size.into()];
        let mut at = Position::START;
        for number in 0..used + available {
            let flags = if number < used { at.used_flags() } else { at.avail_flags() };
            let id = (number % (u32::from(size) - 1)) as u16;
            descs[usize::from(at.index)] =
                PackedDesc { addr: 4096.into(), len: 1.into(), id: id.into(), flags: flags.into() };
            at = at.after(1, size);
        }
        descs
    }

    #[test]
    fn the_position_of_a_ring_of_single_descriptors_is_deduced() {
        for size in [2, 3, 8] {
            for used in 0..4 * u32::from(size) {
                for available in 0..=u32::from(size) {
                    let (round, index) = (used / u32::from(size), (used % u32::from(size)) as u16);
                    let position = Position { index, wrap: round.is_multiple_of(2) };
                    let descs = ring(size, used, available);
                    let found = used_position(&descs);
                    // With only one id, an available request may be the rest of a chain.
                    assert!(found == Some(position) || size == 2 && found.is_none(), "{size} {used} {available}");
                    assert!(!contradicts(&descs, position));
                }
            }
        }
    }

    #[test]
    fn no_position_is_deduced_if_the_ring_may_contain_the_rest_of_a_chain() {
        let mut descs = ring(8, 3, 1);
        assert_eq!(used_position(&descs), Some(Position { index: 3, wrap: true }));
        descs[3].id = descs[2].id;
        assert_eq!(used_position(&descs), None);
        let mut descs = ring(8, 3, 2);
        descs[4].flags = (descs[4].flags.get() | DESC_F_NEXT).into();
        assert_eq!(used_position(&descs), None);
        // A used request after the available ones.
        let mut descs = ring(8, 11, 0);
        descs.swap(2, 5);
        assert_eq!(used_position(&descs), None);
    }

    #[test]
    fn a_base_from_another_round_is_contradicted() {
        assert!(contradicts(&ring(8, 5, 0), Position::START));
        assert!(contradicts(&ring(8, 5, 0), Position { index: 6, wrap: true }));
        assert!(contradicts(&ring(8, 11, 0), Position::START));
        assert!(!contradicts(&ring(8, 0, 4), Position::START));
    }

    #[test]
    fn descriptors_that_no_driver_has_written_contradict_no_base() {
        let base = Position { index: 5, wrap: true };
        let mut descs = ring(8, 0, 0);
        assert!(!contradicts(&descs, base));
        descs[5] = PackedDesc { addr: 4096.into(), len: 1.into(), id: 0.into(), flags: base.avail_flags().into() };
        assert!(!contradicts(&descs, base));
        assert_eq!(used_position(&descs), None);
    }
}
