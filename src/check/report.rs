//! What a run found: one finding per check, and a verdict per rule of `docs/protocol.md`; as a table, and for CI.

use std::collections::BTreeMap;
use std::fmt::{self, Write};
use std::path::PathBuf;

use serde::Serialize;

/// What became of a promise.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// It could not be seen, or was not to be tried.
    NotTested,
    /// The back-end does not promise it.
    NotOffered,
    /// It was kept as far as was seen.
    Kept,
    /// It was kept, at a price that is worth knowing.
    Warning,
    /// It was not kept.
    Broken,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Verdict::NotTested => "not tested",
            Verdict::NotOffered => "not offered",
            Verdict::Kept => "kept",
            Verdict::Warning => "warning",
            Verdict::Broken => "broken",
        })
    }
}

/// What one check came to.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Finding {
    /// The rule of `docs/protocol.md` that it is about.
    pub rule: &'static str,
    /// What was to be seen, in a few words.
    pub what: &'static str,
    /// On which rings it was seen; empty if they make no difference.
    pub rings: &'static str,
    /// What became of it.
    pub verdict: Verdict,
    /// What was seen.
    pub seen: String,
    /// How long that took.
    pub seconds: f64,
}

/// Everything that a run found.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The back-end's socket.
    pub socket: PathBuf,
    /// What the back-end says of itself: features, protocol features, queues.
    pub offers: String,
    /// One per check, in the order in which they were made; then the rules that no check is about.
    pub findings: Vec<Finding>,
}

impl Report {
    /// The worst verdict of each rule.
    pub fn rules(&self) -> BTreeMap<&'static str, Verdict> {
        let mut rules = BTreeMap::new();
        for finding in &self.findings {
            let verdict = rules.entry(finding.rule).or_insert(finding.verdict);
            *verdict = (*verdict).max(finding.verdict);
        }
        rules
    }

    /// Whether a rule was broken.
    pub fn is_broken(&self) -> bool {
        self.findings.iter().any(|finding| finding.verdict == Verdict::Broken)
    }

    /// How many findings there are of a verdict.
    pub fn count(&self, verdict: Verdict) -> usize {
        self.findings.iter().filter(|finding| finding.verdict == verdict).count()
    }

    /// The report as JUnit XML: a test case per check. What is broken failed; what was not tried, or is not offered, was
    /// skipped.
    pub fn junit(&self) -> String {
        let skipped = self.count(Verdict::NotTested) + self.count(Verdict::NotOffered);
        let (tests, failures) = (self.findings.len(), self.count(Verdict::Broken));
        let seconds: f64 = self.findings.iter().map(|finding| finding.seconds).sum();
        let mut xml = String::from("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n");
        // Writing to a string can't fail.
        let _ = writeln!(
            xml,
            "<testsuite name=\"vhost-migrate check {}\" tests=\"{tests}\" failures=\"{failures}\" errors=\"0\" \
             skipped=\"{skipped}\" time=\"{seconds:.3}\">",
            escape(&self.socket.display().to_string())
        );
        for finding in &self.findings {
            let Finding { rule, what, rings, verdict, seen, seconds } = finding;
            let (what, seen) = (escape(what), escape(seen));
            let rings = if rings.is_empty() { String::new() } else { format!(" ({rings})") };
            let inside = match verdict {
                Verdict::Broken => format!("<failure message=\"{seen}\"/>"),
                Verdict::NotTested | Verdict::NotOffered => format!("<skipped message=\"{verdict}: {seen}\"/>"),
                Verdict::Kept | Verdict::Warning => format!("<system-out>{verdict}: {seen}</system-out>"),
            };
            let _ = writeln!(
                xml,
                "  <testcase classname=\"{rule}\" name=\"{rule} {what}{rings}\" time=\"{seconds:.3}\">{inside}</testcase>"
            );
        }
        xml + "</testsuite>\n"
    }
}

/// The table for people.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}: {}", self.socket.display(), self.offers)?;
        writeln!(f, "{:5} {:12} {:15} what was checked: what was seen", "rule", "verdict", "rings")?;
        for Finding { rule, what, rings, verdict, seen, .. } in &self.findings {
            writeln!(f, "{rule:5} {verdict:12} {rings:15} {what}: {seen}")?;
        }
        let all = [Verdict::Broken, Verdict::Warning, Verdict::Kept, Verdict::NotOffered, Verdict::NotTested];
        let counts: Vec<String> = all.iter().map(|verdict| format!("{} {verdict}", self.count(*verdict))).collect();
        write!(f, "{}", counts.join(", "))
    }
}

/// Text as it may stand in XML, in an attribute too. Characters that XML can't carry are replaced.
fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&apos;"),
            '\t' | '\n' | '\r' => {
                let _ = write!(escaped, "&#{};", u32::from(character));
            }
            '\0'..='\x1f' | '\u{fffe}' | '\u{ffff}' => escaped.push('\u{fffd}'),
            other => escaped.push(other),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finding(verdict: Verdict, seen: &str) -> Finding {
        Finding { rule: "R3", what: "drain", rings: "", verdict, seen: seen.into(), seconds: 0.5 }
    }

    #[test]
    fn the_worst_finding_is_the_verdict_of_its_rule() {
        let findings = vec![finding(Verdict::Kept, ""), finding(Verdict::Broken, ""), finding(Verdict::NotTested, "")];
        let mut report = Report { socket: "s".into(), offers: String::new(), findings };
        assert_eq!(report.rules(), BTreeMap::from([("R3", Verdict::Broken)]));
        assert!(report.is_broken());
        report.findings.retain(|finding| finding.verdict != Verdict::Broken);
        assert_eq!(report.rules(), BTreeMap::from([("R3", Verdict::Kept)]));
        assert!(!report.is_broken());
    }

    #[test]
    fn whatever_was_seen_is_escaped_in_xml() {
        let report = Report {
            socket: "a<&>\"'".into(),
            offers: String::new(),
            findings: vec![finding(Verdict::Broken, "<b>&\"'\n\0\u{ffff}"), finding(Verdict::Kept, "]]>")],
        };
        let xml = report.junit();
        assert!(xml.contains("name=\"vhost-migrate check a&lt;&amp;&gt;&quot;&apos;\" tests=\"2\" failures=\"1\""));
        assert!(xml.contains("message=\"&lt;b&gt;&amp;&quot;&apos;&#10;\u{fffd}\u{fffd}\""), "{xml}");
        assert!(xml.contains("<system-out>kept: ]]&gt;</system-out>"), "{xml}");
    }
}
