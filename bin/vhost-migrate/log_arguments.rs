//! Log messages on stderr.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

/// Selection of log messages.
#[derive(Debug, clap::Args)]
pub(crate) struct LogArguments {
    /// Minimum level of messages on stderr: error, warn, info, debug; by default the value of RUST_LOG, or info
    #[arg(long, value_name = "LEVEL")]
    log_level: Option<tracing::Level>,
}

impl LogArguments {
    /// Starts printing messages.
    pub(crate) fn start(&self) {
        let filter = match self.log_level {
            Some(level) => EnvFilter::new(level.to_string()),
            None => EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info")),
        };
        tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_writer(std::io::stderr)
            .with_ansi(std::io::stderr().is_terminal())
            .with_target(false)
            .init();
    }
}
