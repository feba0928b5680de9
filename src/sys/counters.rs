//! Counters of the facade `metrics`. Without the feature `metrics`, counters of the same interface that do nothing.

#[cfg(all(feature = "metrics", feature = "backend"))]
pub(crate) use metrics::Counter;
#[cfg(feature = "metrics")]
pub(crate) use metrics::counter;

#[cfg(not(feature = "metrics"))]
mod off {
    /// A counter that does nothing.
    pub(crate) struct Counter;

    impl Counter {
        pub(crate) fn increment(&self, _: u64) {}
    }

    /// Evaluates the values of the labels and returns a counter that does nothing.
    macro_rules! counter {
        ($name:expr $(, $label:expr => $value:expr)* $(,)?) => {{
            let _ = ($name, $($value,)*);
            $crate::sys::counters::Counter
        }};
    }

    pub(crate) use counter;
}

#[cfg(not(feature = "metrics"))]
pub(crate) use off::{Counter, counter};
