//! The imports between the files of src: modules use what docs/architecture.md lists, and no import is circular.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use syn::visit::Visit;
use syn::{Attribute, ItemMod, ItemUse, UseTree};

/// The segments of a module's path, without `crate`.
type ModulePath = Vec<String>;
/// Each module, and the modules that it uses.
type Uses<T> = BTreeMap<T, BTreeSet<T>>;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Adds the source of each module of a folder to `found`.
fn read_sources(folder: &Path, module: &ModulePath, found: &mut BTreeMap<ModulePath, String>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
        let mut module = module.clone();
        if !["lib", "mod"].contains(&name.as_str()) {
            module.push(name);
        }
        if path.is_dir() {
            read_sources(&path, &module, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.insert(module, fs::read_to_string(&path).unwrap());
        }
    }
}

/// Collects the paths that a module's code uses, except in unit tests.
struct PathCollector<'a> {
    module: &'a ModulePath,
    paths: BTreeSet<ModulePath>,
}

impl PathCollector<'_> {
    /// Adds a path that begins with `crate`, `self` or `super`.
    fn add(&mut self, segments: impl IntoIterator<Item = String>) {
        let mut segments = segments.into_iter();
        let mut path = match segments.next().as_deref() {
            Some("crate") => Vec::new(),
            Some("self") => self.module.clone(),
            Some("super") => parent(self.module),
            _ => return,
        };
        for segment in segments {
            if segment == "super" { path = parent(&path) } else { path.push(segment) }
        }
        self.paths.insert(path);
    }

    fn add_use(&mut self, before: &[String], tree: &UseTree) {
        match tree {
            UseTree::Path(path) => self.add_use(&[before, &[path.ident.to_string()]].concat(), &path.tree),
            UseTree::Name(name) => self.add([before, &[name.ident.to_string()]].concat()),
            UseTree::Rename(rename) => self.add([before, &[rename.ident.to_string()]].concat()),
            UseTree::Glob(_) => self.add(before.to_vec()),
            UseTree::Group(group) => group.items.iter().for_each(|tree| self.add_use(before, tree)),
        }
    }
}

impl Visit<'_> for PathCollector<'_> {
    fn visit_item_mod(&mut self, module: &ItemMod) {
        let is_test = |attribute: &Attribute| {
            attribute.path().is_ident("cfg") && attribute.parse_args::<syn::Path>().is_ok_and(|p| p.is_ident("test"))
        };
        if !module.attrs.iter().any(is_test) {
            syn::visit::visit_item_mod(self, module);
        }
    }

    fn visit_item_use(&mut self, item: &ItemUse) {
        self.add_use(&[], &item.tree);
    }

    fn visit_path(&mut self, path: &syn::Path) {
        self.add(path.segments.iter().map(|segment| segment.ident.to_string()));
        syn::visit::visit_path(self, path);
    }
}

fn parent(module: &ModulePath) -> ModulePath {
    module.split_last().map(|(_, parent)| parent.to_vec()).unwrap_or_default()
}

/// Returns the other modules that the code of `module` uses. Of `modules`, the longest that begins a path counts.
fn used_modules(module: &ModulePath, code: &str, modules: &BTreeSet<ModulePath>) -> BTreeSet<ModulePath> {
    let mut collector = PathCollector { module, paths: BTreeSet::new() };
    collector.visit_file(&syn::parse_file(code).unwrap());
    let of_path = |path: &ModulePath| (0..=path.len()).rev().map(|n| path[..n].to_vec()).find(|m| modules.contains(m));
    collector.paths.iter().filter_map(of_path).filter(|used| used != module).collect()
}

fn uses() -> Uses<ModulePath> {
    let mut sources = BTreeMap::new();
    read_sources(&root().join("src"), &Vec::new(), &mut sources);
    let modules = sources.keys().cloned().collect();
    sources.iter().map(|(module, code)| (module.clone(), used_modules(module, code, &modules))).collect()
}

/// Returns the modules directly below `folder` and what they use of each other. A module includes those below it.
fn uses_within(folder: &ModulePath, uses: &Uses<ModulePath>) -> Uses<String> {
    let child = |module: &ModulePath| module.strip_prefix(folder.as_slice())?.first().cloned();
    let mut within = Uses::new();
    for (module, used) in uses {
        let Some(user) = child(module) else { continue };
        let others = used.iter().filter_map(child).filter(|other| *other != user);
        within.entry(user.clone()).or_insert_with(BTreeSet::new).extend(others);
    }
    within
}

/// Returns modules that use each other in circles, with what uses them or is used by them.
fn circle(mut uses: Uses<String>) -> Uses<String> {
    while let Some(free) = uses.iter().find(|(_, used)| used.is_empty()).map(|(module, _)| module.clone()) {
        uses.remove(&free);
        uses.values_mut().for_each(|used| {
            used.remove(&free);
        });
    }
    uses
}

/// Returns the table of docs/architecture.md: each module, and the modules that it may use.
fn documented() -> Uses<String> {
    let text = fs::read_to_string(root().join("docs/architecture.md")).unwrap();
    let table = text.split("| module | may use |\n|---|---|\n").nth(1).expect("docs/architecture.md has the table");
    let rows = table.lines().take_while(|line| line.starts_with('|'));
    rows.map(|row| {
        let mut words = row.split('`').skip(1).step_by(2).map(str::to_owned);
        (words.next().unwrap(), words.collect())
    })
    .collect()
}

#[test]
fn modules_use_what_the_architecture_lists_and_nothing_else() {
    let (documented, modules) = (documented(), uses_within(&Vec::new(), &uses()));
    assert!(documented.keys().eq(modules.keys()), "a row for each module");
    for (module, used) in &modules {
        assert_eq!(&documented[module], used, "{module}: docs/architecture.md (left) and its code (right)");
    }
}

#[test]
fn files_of_a_folder_do_not_use_each_other_in_circles() {
    let uses = uses();
    let folders: BTreeSet<ModulePath> = uses.keys().filter(|module| !module.is_empty()).map(parent).collect();
    for folder in folders {
        let found = circle(uses_within(&folder, &uses));
        assert!(found.is_empty(), "modules of {folder:?} use each other in a circle: {found:?}");
    }
}

#[test]
fn the_reader_of_imports_finds_them() {
    let module = |text: &str| text.split("::").map(str::to_owned).collect::<ModulePath>();
    let modules = ["a", "a::b", "a::c", "d", "e", "f", "f::g"].map(module).into_iter().collect();
    let code = "use super::c::{Type, function as other};\n// crate::e\nuse crate::{d::*, std};\n\
                fn f() -> Option<crate::f::g::Type> { self::h::i(); None }\n\
                #[cfg(test)]\nmod tests { use crate::e; }\n";
    assert_eq!(used_modules(&module("a::b"), code, &modules), ["a::c", "d", "f::g"].map(module).into());
}

#[test]
fn a_circle_is_found() {
    let uses = |pairs: [(&str, &[&str]); 3]| {
        pairs.map(|(user, used)| (user.to_owned(), used.iter().map(ToString::to_string).collect())).into()
    };
    assert!(circle(uses([("a", &["b", "c"]), ("b", &["c"]), ("c", &[])])).is_empty());
    assert_eq!(circle(uses([("a", &[]), ("b", &["a", "c"]), ("c", &["b"])])).len(), 2);
}
