//! Single stores into an inflight region, and their targets: shared memory, a copy of it, or a list of stores.
//!
//! The order of the stores is in `split` and `packed`.

/// One store into a queue's part of an inflight region: offset in bytes, and value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Store {
    /// A store of one byte.
    U8(usize, u8),
    /// A store of two bytes.
    U16(usize, u16),
    /// A store of four bytes.
    U32(usize, u32),
    /// A store of eight bytes.
    U64(usize, u64),
}

impl Store {
    /// Executes this store on `sink`.
    pub fn to(self, sink: &mut (impl StoreSink + ?Sized)) {
        match self {
            Store::U8(offset, value) => sink.u8(offset, value),
            Store::U16(offset, value) => sink.u16(offset, value),
            Store::U32(offset, value) => sink.u32(offset, value),
            Store::U64(offset, value) => sink.u64(offset, value),
        }
    }
}

/// The target of stores, which are executed in order. A crash may happen between any two of them.
///
/// Offsets are in bytes from the start of the queue's part and aligned. Values are in host byte order. A store outside
/// the queue's part is ignored.
pub trait StoreSink {
    /// Stores one byte.
    fn u8(&mut self, offset: usize, value: u8);
    /// Stores two bytes.
    fn u16(&mut self, offset: usize, value: u16);
    /// Stores four bytes.
    fn u32(&mut self, offset: usize, value: u32);
    /// Stores eight bytes.
    fn u64(&mut self, offset: usize, value: u64);
}

/// Collects the stores.
impl StoreSink for Vec<Store> {
    fn u8(&mut self, offset: usize, value: u8) {
        self.push(Store::U8(offset, value));
    }
    fn u16(&mut self, offset: usize, value: u16) {
        self.push(Store::U16(offset, value));
    }
    fn u32(&mut self, offset: usize, value: u32) {
        self.push(Store::U32(offset, value));
    }
    fn u64(&mut self, offset: usize, value: u64) {
        self.push(Store::U64(offset, value));
    }
}

/// Executes the stores on a copy of the queue's part.
impl StoreSink for [u8] {
    fn u8(&mut self, offset: usize, value: u8) {
        copy(self, offset, [value]);
    }
    fn u16(&mut self, offset: usize, value: u16) {
        copy(self, offset, value.to_le_bytes());
    }
    fn u32(&mut self, offset: usize, value: u32) {
        copy(self, offset, value.to_le_bytes());
    }
    fn u64(&mut self, offset: usize, value: u64) {
        copy(self, offset, value.to_le_bytes());
    }
}

fn copy<const N: usize>(bytes: &mut [u8], offset: usize, value: [u8; N]) {
    if let Some(to) = bytes.get_mut(offset..).and_then(|rest| rest.first_chunk_mut::<N>()) {
        *to = value;
    }
}
