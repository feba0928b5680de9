//! The vectors that a harvest is written over: eight words (AVX-512), four (AVX2), one (any CPU).
//!
//! Only what the algorithm in `harvest` needs, each method one or a few instructions. No decisions here but which
//! vector this CPU has.

/// Some consecutive 64-bit words of a bitmap, in registers.
///
/// # Safety
/// All methods: the CPU has the instructions of the vector, see [`Isa::available`]. Pointers: `WORDS` words can be
/// read or written there; those into a log are aligned to the vector, those into a set to a word.
pub(super) trait Vector: Copy {
    /// Words in one vector; divides 64.
    const WORDS: usize;
    /// Reads words of a log. Others may be changing them: each word is read at some moment.
    unsafe fn load_log(from: *const u64) -> Self;
    /// Writes zero to words of a log.
    unsafe fn clear_log(at: *mut u64);
    /// Reads words of a set.
    unsafe fn load(from: *const u64) -> Self;
    /// Writes words of a set.
    unsafe fn store(self, at: *mut u64);
    /// All words zero.
    unsafe fn zero() -> Self;
    /// Word-wise `self | other`.
    unsafe fn or(self, other: Self) -> Self;
    /// Word-wise `self & !other`.
    unsafe fn and_not(self, other: Self) -> Self;
    /// Word-wise `self + other`.
    unsafe fn add(self, other: Self) -> Self;
    /// Word-wise number of bits that are set.
    unsafe fn ones(self) -> Self;
    /// The sum of all words.
    unsafe fn sum(self) -> u64;
    /// Bit `i` for every word `i` that is not zero.
    unsafe fn live(self) -> u64;
}

/// Which vector to use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Isa {
    /// Words, on any CPU.
    Scalar,
    /// Four words.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// Eight words, with a population count of their own.
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Isa {
    /// All that there are, widest first.
    #[cfg(target_arch = "x86_64")]
    pub(super) const ALL: &[Isa] = &[Isa::Avx512, Isa::Avx2, Isa::Scalar];
    /// All that there are, widest first.
    #[cfg(not(target_arch = "x86_64"))]
    pub(super) const ALL: &[Isa] = &[Isa::Scalar];

    /// Whether this CPU has it. The CPU is asked once per process.
    pub(super) fn available(self) -> bool {
        match self {
            Isa::Scalar => true,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("popcnt"),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => {
                is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512vpopcntdq")
                    && is_x86_feature_detected!("popcnt")
            }
        }
    }

    /// Whether this CPU can use it for a log at `address`.
    pub(super) fn fits(self, address: usize) -> bool {
        self.available() && address.is_multiple_of(self.align())
    }

    /// Bytes of its vector: what a log must be aligned to.
    pub(super) fn align(self) -> usize {
        match self {
            Isa::Scalar => 8,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => 32,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => 64,
        }
    }

    /// The widest that this CPU has and that a log at `address` is aligned for.
    pub(super) fn best_for(address: usize) -> Isa {
        Isa::ALL.iter().find(|isa| isa.fits(address)).copied().unwrap_or(Isa::Scalar)
    }
}

impl Vector for u64 {
    const WORDS: usize = 1;

    #[inline(always)]
    unsafe fn load_log(from: *const u64) -> u64 {
        // SAFETY: as the trait demands.
        u64::from_le(unsafe { from.read_volatile() })
    }

    #[inline(always)]
    unsafe fn clear_log(at: *mut u64) {
        // SAFETY: as the trait demands.
        unsafe { at.write_volatile(0) }
    }

    #[inline(always)]
    unsafe fn load(from: *const u64) -> u64 {
        // SAFETY: as the trait demands.
        unsafe { from.read() }
    }

    #[inline(always)]
    unsafe fn store(self, at: *mut u64) {
        // SAFETY: as the trait demands.
        unsafe { at.write(self) }
    }

    #[inline(always)]
    unsafe fn zero() -> u64 {
        0
    }

    #[inline(always)]
    unsafe fn or(self, other: u64) -> u64 {
        self | other
    }

    #[inline(always)]
    unsafe fn and_not(self, other: u64) -> u64 {
        self & !other
    }

    #[inline(always)]
    unsafe fn add(self, other: u64) -> u64 {
        self.wrapping_add(other)
    }

    #[inline(always)]
    unsafe fn ones(self) -> u64 {
        self.count_ones().into()
    }

    #[inline(always)]
    unsafe fn sum(self) -> u64 {
        self
    }

    #[inline(always)]
    unsafe fn live(self) -> u64 {
        (self != 0).into()
    }
}

/// The x86 vectors. Each method is the instruction of its name; what the trait demands is what they need.
#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::Vector;

    impl Vector for __m256i {
        const WORDS: usize = 4;

        #[inline(always)]
        unsafe fn load_log(from: *const u64) -> __m256i {
            // SAFETY: as the trait demands.
            unsafe { from.cast::<__m256i>().read_volatile() }
        }

        #[inline(always)]
        unsafe fn clear_log(at: *mut u64) {
            // SAFETY: as the trait demands.
            unsafe { at.cast::<__m256i>().write_volatile(_mm256_setzero_si256()) }
        }

        #[inline(always)]
        unsafe fn load(from: *const u64) -> __m256i {
            // SAFETY: as the trait demands.
            unsafe { _mm256_loadu_si256(from.cast()) }
        }

        #[inline(always)]
        unsafe fn store(self, at: *mut u64) {
            // SAFETY: as the trait demands.
            unsafe { _mm256_storeu_si256(at.cast(), self) }
        }

        #[inline(always)]
        unsafe fn zero() -> __m256i {
            // SAFETY: as the trait demands.
            unsafe { _mm256_setzero_si256() }
        }

        #[inline(always)]
        unsafe fn or(self, other: __m256i) -> __m256i {
            // SAFETY: as the trait demands.
            unsafe { _mm256_or_si256(self, other) }
        }

        #[inline(always)]
        unsafe fn and_not(self, other: __m256i) -> __m256i {
            // SAFETY: as the trait demands.
            unsafe { _mm256_andnot_si256(other, self) }
        }

        #[inline(always)]
        unsafe fn add(self, other: __m256i) -> __m256i {
            // SAFETY: as the trait demands.
            unsafe { _mm256_add_epi64(self, other) }
        }

        /// Looks up the count of every half byte, and sums the bytes of each word.
        #[inline(always)]
        unsafe fn ones(self) -> __m256i {
            // SAFETY: as the trait demands.
            unsafe {
                let counts = _mm256_setr_epi8(
                    0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4, //
                    0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4,
                );
                let half = _mm256_set1_epi8(0xf);
                let low = _mm256_shuffle_epi8(counts, _mm256_and_si256(self, half));
                let high = _mm256_shuffle_epi8(counts, _mm256_and_si256(_mm256_srli_epi16(self, 4), half));
                _mm256_sad_epu8(_mm256_add_epi8(low, high), _mm256_setzero_si256())
            }
        }

        #[inline(always)]
        unsafe fn sum(self) -> u64 {
            let mut words = [0u64; 4];
            // SAFETY: the array has room for the vector.
            unsafe { _mm256_storeu_si256(words.as_mut_ptr().cast(), self) };
            words.iter().sum()
        }

        #[inline(always)]
        unsafe fn live(self) -> u64 {
            // SAFETY: as the trait demands.
            let zero = unsafe { _mm256_movemask_pd(_mm256_castsi256_pd(_mm256_cmpeq_epi64(self, Self::zero()))) };
            u64::from(!zero.cast_unsigned() & 0xf)
        }
    }

    impl Vector for __m512i {
        const WORDS: usize = 8;

        #[inline(always)]
        unsafe fn load_log(from: *const u64) -> __m512i {
            // SAFETY: as the trait demands.
            unsafe { from.cast::<__m512i>().read_volatile() }
        }

        #[inline(always)]
        unsafe fn clear_log(at: *mut u64) {
            // SAFETY: as the trait demands.
            unsafe { at.cast::<__m512i>().write_volatile(_mm512_setzero_si512()) }
        }

        #[inline(always)]
        unsafe fn load(from: *const u64) -> __m512i {
            // SAFETY: as the trait demands.
            unsafe { _mm512_loadu_si512(from.cast()) }
        }

        #[inline(always)]
        unsafe fn store(self, at: *mut u64) {
            // SAFETY: as the trait demands.
            unsafe { _mm512_storeu_si512(at.cast(), self) }
        }

        #[inline(always)]
        unsafe fn zero() -> __m512i {
            // SAFETY: as the trait demands.
            unsafe { _mm512_setzero_si512() }
        }

        #[inline(always)]
        unsafe fn or(self, other: __m512i) -> __m512i {
            // SAFETY: as the trait demands.
            unsafe { _mm512_or_si512(self, other) }
        }

        #[inline(always)]
        unsafe fn and_not(self, other: __m512i) -> __m512i {
            // SAFETY: as the trait demands.
            unsafe { _mm512_andnot_si512(other, self) }
        }

        #[inline(always)]
        unsafe fn add(self, other: __m512i) -> __m512i {
            // SAFETY: as the trait demands.
            unsafe { _mm512_add_epi64(self, other) }
        }

        #[inline(always)]
        unsafe fn ones(self) -> __m512i {
            // SAFETY: as the trait demands.
            unsafe { _mm512_popcnt_epi64(self) }
        }

        #[inline(always)]
        unsafe fn sum(self) -> u64 {
            // SAFETY: as the trait demands.
            unsafe { _mm512_reduce_add_epi64(self) }.cast_unsigned()
        }

        #[inline(always)]
        unsafe fn live(self) -> u64 {
            // SAFETY: as the trait demands.
            unsafe { _mm512_test_epi64_mask(self, self) }.into()
        }
    }
}
