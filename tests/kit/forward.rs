//! Devices and queues that wrap another one and replace a few of its functions.

/// Implements functions of a trait by those of the device or queue in a field.
macro_rules! forward {
    ($field:tt: $($function:ident -> $value:ty),+) => {
        $(fn $function(&self) -> $value {
            self.$field.$function()
        })+
    };
}

pub(crate) use forward;
