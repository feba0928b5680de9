//! Every public type has a unique name, so that the name alone identifies the type.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};

/// Types that are public at two paths.
const AT_TWO_PATHS: [&str; 5] = ["IotlbMsg", "RegionLayout", "VringAddr", "VringAddrFlags", "VringState"];

/// The paths of the public types in a listing like docs/public-api.txt, by their names.
fn types(listing: &str) -> BTreeMap<&str, BTreeSet<&str>> {
    let mut types: BTreeMap<_, BTreeSet<_>> = BTreeMap::new();
    let is_kind = |word: &&str| ["struct", "enum", "union", "trait"].contains(word);
    for line in listing.lines() {
        let mut words = line.split([' ', '<', '(']).skip_while(|word| !is_kind(word)).skip(1);
        if let Some(path) = words.next().filter(|path| path.starts_with("vhost_migrate::")) {
            types.entry(path.rsplit("::").next().unwrap()).or_default().insert(path);
        }
    }
    types
}

#[test]
fn no_two_public_types_have_one_name() {
    let types = types(include_str!("../docs/public-api.txt"));
    assert!(types.len() > 150, "{} types were found", types.len());
    let shared: Vec<_> = types.iter().filter(|(_, paths)| paths.len() > 1).collect();
    let names: Vec<_> = shared.iter().map(|(name, _)| **name).collect();
    assert_eq!(names, AT_TWO_PATHS, "{shared:#?}");
}

#[test]
fn a_shared_name_is_found() {
    let listing = "#[repr(C)] pub struct vhost_migrate::abi::Request\npub struct vhost_migrate::Request<'a>\n\
                   pub fn vhost_migrate::Request::len(&self)\npub enum vhost_migrate::Access";
    let types = types(listing);
    assert_eq!((types["Request"].len(), types["Access"].len()), (2, 1));
}
