//! The errors of src: the text of an error leaves out its source, whose text `source()` gives. A chain of errors then
//! has each text once.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;
use std::path::Path;

use syn::visit::Visit;
use syn::{Attribute, Field, Fields, Ident, ItemEnum, ItemStruct};

/// Collects the errors of a file that break the rule, and counts those that have a source.
#[derive(Default)]
struct Errors {
    with_source: usize,
    faults: Vec<String>,
}

impl Errors {
    fn read(&mut self, code: &str) {
        self.visit_file(&syn::parse_file(code).unwrap());
    }

    fn read_folder(&mut self, folder: &Path) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                self.read_folder(&path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                self.read(&fs::read_to_string(&path).unwrap());
            }
        }
    }

    /// Checks a variant or a struct. It is an error if it has the attribute `error`.
    fn check(&mut self, name: &str, attributes: &[Attribute], fields: &Fields) {
        let Some(attribute) = attributes.iter().find(|attribute| attribute.path().is_ident("error")) else { return };
        let format = Format::read(attribute);
        for (index, field) in fields.iter().enumerate().filter(|_| format.text != "transparent") {
            let field_name = field.ident.as_ref().map_or_else(|| index.to_string(), Ident::to_string);
            if is_source(field) {
                self.with_source += 1;
                if format.shows(&field_name) {
                    self.faults.push(format!("{name} shows its source"));
                }
            } else if is_error(field) && !format.shows_causes_of(&field_name) {
                self.faults.push(format!("{name}: {field_name} is not the source, and its causes are not shown"));
            }
        }
    }
}

impl Visit<'_> for Errors {
    fn visit_item_enum(&mut self, item: &ItemEnum) {
        for variant in &item.variants {
            self.check(&format!("{}::{}", item.ident, variant.ident), &variant.attrs, &variant.fields);
        }
    }

    fn visit_item_struct(&mut self, item: &ItemStruct) {
        self.check(&item.ident.to_string(), &item.attrs, &item.fields);
    }
}

/// Returns true if thiserror makes the field the source.
fn is_source(field: &Field) -> bool {
    let is_marked = |attribute: &Attribute| attribute.path().is_ident("source") || attribute.path().is_ident("from");
    field.attrs.iter().any(is_marked) || field.ident.as_ref().is_some_and(|name| name == "source")
}

/// Returns true if the type of the field names an error.
fn is_error(field: &Field) -> bool {
    struct Search(bool);
    impl Visit<'_> for Search {
        fn visit_ident(&mut self, name: &Ident) {
            self.0 |= name.to_string().ends_with("Error");
        }
    }
    let mut search = Search(false);
    search.visit_type(&field.ty);
    search.0
}

/// The content of an attribute `error`.
struct Format {
    /// The text in quotation marks, or the word `transparent`.
    text: String,
    /// The arguments after it, without spaces.
    arguments: String,
}

impl Format {
    fn read(attribute: &Attribute) -> Format {
        let mut tokens = attribute.meta.require_list().unwrap().tokens.clone().into_iter();
        let text = tokens.next().unwrap().to_string().replace("{{", "");
        let arguments = tokens.map(|token| token.to_string()).collect::<String>();
        Format { text, arguments: arguments.split_whitespace().collect() }
    }

    /// Returns true if the text or an argument names the field.
    fn shows(&self, field: &str) -> bool {
        let in_text = [format!("{{{field}}}"), format!("{{{field}:")].iter().any(|braces| self.text.contains(braces));
        in_text || names(&self.arguments, field)
    }

    /// Returns true if an argument is `with_causes` of the field.
    fn shows_causes_of(&self, field: &str) -> bool {
        let calls = self.arguments.split("with_causes(").skip(1);
        calls.filter_map(|rest| rest.split(')').next()).any(|argument| names(argument, field))
    }
}

/// Returns true if `arguments` name the field, other than for its `kind()`, which has no text of it.
fn names(arguments: &str, field: &str) -> bool {
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    arguments.match_indices(field).any(|(start, _)| {
        let (before, after) = (&arguments[..start], &arguments[start + field.len()..]);
        let is_whole = !after.starts_with(is_word) && (before.ends_with('_') || !before.ends_with(is_word));
        is_whole && !after.starts_with(".kind()")
    })
}

#[test]
fn no_error_shows_its_source_and_no_cause_is_lost() {
    let mut errors = Errors::default();
    errors.read_folder(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"));
    assert!(errors.faults.is_empty(), "{:#?}", errors.faults);
    assert!(errors.with_source > 30, "found {}", errors.with_source);
}

#[test]
fn each_way_to_show_a_source_is_found() {
    for variant in [
        "#[error(\"can't: {source}\")] A { source: io::Error }",
        "#[error(\"can't: {source:?}\")] A { source: io::Error }",
        "#[error(\"can't: {}\", source)] A { source: io::Error }",
        "#[error(\"can't: {}\", .source)] A { source: io::Error }",
        "#[error(\"can't: {}\", advice(source))] A { source: io::Error }",
        "#[error(\"can't: {why}\", why = .source)] A { source: io::Error }",
        "#[error(\"can't: {cause}\")] A { #[source] cause: io::Error }",
        "#[error(\"can't: {0}\")] A(#[from] io::Error)",
        "#[error(\"can't: {}\", .0)] A(#[source] io::Error)",
        "#[error(\"can't: {}\", _0)] A(#[source] io::Error)",
        "#[error(\"can't: {}\", fmt(.1))] A(u8, #[source] io::Error)",
        // Errors that are not the source.
        "#[error(\"can't: {0}\")] A(io::Error)",
        "#[error(\"can't\")] A { cause: Box<dyn Error> }",
        "#[error(\"{}\", with_causes(first))] A { first: VmError, second: VmError }",
    ] {
        let mut errors = Errors::default();
        errors.read(&format!("enum E {{ {variant} }}"));
        assert_eq!(errors.faults.len(), 1, "{variant}: {:?}", errors.faults);
    }
    let mut errors = Errors::default();
    errors.read(
        "enum E {
            #[error(transparent)] A(#[from] io::Error),
            #[error(\"the source: {{source}} {source_name}\")] B { source_name: u8, source: io::Error },
            #[error(\"can't {}\", advice(source.kind()))] C { source: io::Error },
            #[error(\"{0}\")] D(String, #[source] io::Error),
            #[error(\"{}; it is paused\", with_causes(error))] E { error: Box<MigrateError>, source: VmError },
        }
        #[error(\"can't\")] struct F(#[source] io::Error);",
    );
    assert!(errors.faults.is_empty(), "{:?}", errors.faults);
    assert_eq!(errors.with_source, 5);
}
