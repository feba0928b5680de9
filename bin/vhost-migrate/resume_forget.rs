//! `vhost-migrate resume` and `vhost-migrate forget`: the operator's decision about a paused guest.

use std::path::PathBuf;
use std::process::ExitCode;

use vhost_migrate::control::{self, ControlCommand};

use crate::values;

/// Arguments of both commands.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Control socket of the process that owns the guest
    #[arg(long, value_name = "SOCKET", value_parser = values::socket_path())]
    control: PathBuf,
}

/// Sends the operator's decision.
pub(crate) fn run(arguments: &Arguments, decision: &ControlCommand) -> ExitCode {
    match control::call(&arguments.control, decision, |_| ()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}
