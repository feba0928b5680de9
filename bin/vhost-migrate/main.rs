//! The command: parses arguments and hands them to the file of the subcommand.

mod backend;
mod interrupt;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Live migration, dirty logging and crash-resume for vhost devices
#[derive(Debug, Parser)]
#[command(version)]
struct Command {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    Backend(backend::Arguments),
}

fn main() -> ExitCode {
    match Command::parse().action {
        Action::Backend(arguments) => backend::run(arguments),
    }
}
