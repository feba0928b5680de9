//! Devices and queues that are others with a few functions of their own.

/// In an `impl`: these functions are those of the device or queue in a field.
macro_rules! forward {
    ($field:tt: $($function:ident -> $value:ty),+) => {
        $(fn $function(&self) -> $value {
            self.$field.$function()
        })+
    };
}

pub(crate) use forward;
