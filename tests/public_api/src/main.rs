//! Prints the public interface in a file of rustdoc's JSON: one line per item, sorted. `tests/public-api` runs it.

use std::collections::BTreeSet;
use std::error::Error;
use std::path::{Path, PathBuf};

/// Returns the items without those that follow from others: implementations of auto traits and of traits for all types.
fn items(json: &Path, with_derived: bool) -> Result<BTreeSet<String>, Box<dyn Error>> {
    let builder = public_api::Builder::from_rustdoc_json(json).omit_auto_trait_impls(true).omit_blanket_impls(true);
    let api = builder.omit_auto_derived_impls(!with_derived).build()?;
    Ok(api.items().map(ToString::to_string).collect())
}

fn main() -> Result<(), Box<dyn Error>> {
    let json = PathBuf::from(std::env::args_os().nth(1).ok_or("usage: public-api-listing FILE")?);
    let written = items(&json, false)?;
    // Of a derived implementation, the line that names the trait.
    for item in items(&json, true)?.iter().filter(|item| item.starts_with("impl") || written.contains(*item)) {
        println!("{item}");
    }
    Ok(())
}
