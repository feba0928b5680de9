//! Results of a run: one finding per check, and a verdict per rule of `docs/protocol.md`; as text, JSON or JUnit XML.

use std::collections::BTreeMap;
use std::fmt::{self, Write};
use std::path::PathBuf;

use serde::Serialize;

use super::explain::{Consequence, explain};
use super::outcome::{Outcome, Verdict};
use super::rules::Rule;

/// Maximum number of checks named in one row.
const MAX_NAMED_CHECKS: usize = 2;

/// Result of one check.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Finding {
    /// Rule of `docs/protocol.md`.
    pub rule: Rule,
    /// Name of the check.
    pub what: &'static str,
    /// Rings that were used; empty if rings make no difference.
    pub rings: &'static str,
    /// Verdict.
    pub verdict: Verdict,
    /// Observation.
    pub seen: String,
    /// Duration.
    pub seconds: f64,
    /// True if the check sends messages that must be refused.
    #[serde(skip)]
    pub(super) hostile: bool,
    /// The check whose effect this is, and the effect without its name.
    #[serde(skip)]
    pub(super) after: Option<(String, String)>,
}

impl Finding {
    /// Returns the finding of a check that depends on no ring and takes no time.
    pub(super) fn new(rule: Rule, what: &'static str, Outcome(verdict, seen): Outcome) -> Finding {
        Finding { rule, what, rings: "", verdict, seen, seconds: 0.0, hostile: false, after: None }
    }

    /// Returns the finding that the next front-end is not served after `check`.
    pub(super) fn after(check: String, effect: String) -> Finding {
        let outcome = Outcome::fail(format!("after \"{check}\": {effect}"));
        let after = Some((check, effect));
        Finding { after, ..Finding::new(Rule::R9, "the next front-end is served", outcome) }
    }
}

/// Results of a run.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct CheckReport {
    /// Path of the back-end's socket.
    pub socket: PathBuf,
    /// Description of the back-end: device, features, protocol features, queues.
    pub offers: String,
    /// One per check in the order of execution; then the rules without a check.
    pub findings: Vec<Finding>,
}

impl CheckReport {
    /// Returns the worst verdict of each rule.
    pub fn rules(&self) -> BTreeMap<Rule, Verdict> {
        let mut rules = BTreeMap::new();
        for finding in &self.findings {
            let verdict = rules.entry(finding.rule).or_insert(finding.verdict);
            *verdict = (*verdict).max(finding.verdict);
        }
        rules
    }

    /// Returns true if a rule was violated.
    pub fn has_failures(&self) -> bool {
        self.findings.iter().any(|finding| finding.verdict == Verdict::Fail)
    }

    /// Returns the number of findings with this verdict.
    pub fn count(&self, verdict: Verdict) -> usize {
        self.findings.iter().filter(|finding| finding.verdict == verdict).count()
    }

    /// Formats the report as JUnit XML with a test case per check. `Fail` is a failure; checks that were not run or not
    /// offered are skipped.
    pub fn junit(&self) -> String {
        let skipped = self.count(Verdict::NotTested) + self.count(Verdict::NotOffered);
        let (tests, failures) = (self.findings.len(), self.count(Verdict::Fail));
        let seconds: f64 = self.findings.iter().map(|finding| finding.seconds).sum();
        let mut xml = String::from("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n");
        // Writing to a string cannot fail.
        let _ = writeln!(
            xml,
            "<testsuite name=\"vhost-migrate check {}\" tests=\"{tests}\" failures=\"{failures}\" errors=\"0\" \
             skipped=\"{skipped}\" time=\"{seconds:.3}\">",
            escape(&self.socket.display().to_string())
        );
        for finding in &self.findings {
            let Finding { rule, what, rings, verdict, seen, seconds, .. } = finding;
            let (what, seen) = (escape(what), escape(seen));
            let rings = if rings.is_empty() { String::new() } else { format!(" ({rings})") };
            let inside = match verdict {
                Verdict::Fail => format!("<failure message=\"{seen}\"/>"),
                Verdict::NotTested | Verdict::NotOffered => format!("<skipped message=\"{verdict}: {seen}\"/>"),
                Verdict::Pass | Verdict::Warning => format!("<system-out>{verdict}: {seen}</system-out>"),
            };
            let _ = writeln!(
                xml,
                "  <testcase classname=\"{rule}\" name=\"{rule} {what}{rings}\" time=\"{seconds:.3}\">{inside}</testcase>"
            );
        }
        xml + "</testsuite>\n"
    }
}

/// Findings with one cause: the same check on several rings, or the same observation by several checks.
struct FindingGroup<'a> {
    verdict: Verdict,
    consequence: Option<Consequence>,
    /// Observation without its numbers.
    cause: String,
    rules: Vec<Rule>,
    rings: Vec<&'a str>,
    checks: Vec<&'a str>,
    seen: &'a str,
}

impl<'a> FindingGroup<'a> {
    fn new(finding: &'a Finding) -> FindingGroup<'a> {
        let Finding { rule, what, rings, verdict, ref seen, .. } = *finding;
        let mut group = FindingGroup {
            verdict,
            consequence: None,
            cause: String::new(),
            rules: vec![rule],
            rings: Vec::new(),
            checks: vec![what],
            seen,
        };
        group.rings.extend((!rings.is_empty()).then_some(rings));
        if matches!(verdict, Verdict::Fail | Verdict::Warning) {
            group.consequence = Some(match finding.hostile {
                true => Consequence::Killed,
                false => explain(rule).consequence,
            });
        }
        // The effect of a check belongs to this check: the check is named, and the effect is the cause.
        if let Some((check, effect)) = &finding.after {
            (group.checks, group.seen) = (vec![check.as_str()], effect);
        }
        // All numbers are treated as equal.
        let parts = group.seen.split(|c: char| c.is_ascii_digit()).filter(|part| !part.is_empty());
        group.cause = parts.collect::<Vec<_>>().join("0");
        group
    }

    /// Returns true if both have the same cause. Passed checks are grouped only by check.
    fn has_same_cause(&self, other: &FindingGroup<'_>) -> bool {
        let same_check = self.rules.iter().any(|rule| other.rules.contains(rule))
            && self.checks.iter().any(|check| other.checks.contains(check));
        let same_cause =
            self.verdict != Verdict::Pass && self.cause == other.cause && self.consequence == other.consequence;
        self.verdict == other.verdict && (same_check || same_cause)
    }

    fn merge(&mut self, other: FindingGroup<'a>) {
        merge(&mut self.rules, other.rules);
        merge(&mut self.rings, other.rings);
        merge(&mut self.checks, other.checks);
    }
}

/// Adds the elements that `all` does not have.
fn merge<T: PartialEq>(all: &mut Vec<T>, more: Vec<T>) {
    for it in more {
        if !all.contains(&it) {
            all.push(it);
        }
    }
}

/// Returns the terminal colour of a verdict.
fn colour(verdict: Verdict) -> u8 {
    match verdict {
        Verdict::Fail => 31,
        Verdict::Warning => 33,
        Verdict::Pass => 32,
        Verdict::NotOffered | Verdict::NotTested => 2,
    }
}

impl CheckReport {
    /// Groups the findings by cause: failures by consequence, then warnings and the rest.
    fn groups(&self) -> Vec<FindingGroup<'_>> {
        let mut groups: Vec<FindingGroup<'_>> = Vec::new();
        for finding in &self.findings {
            let group = FindingGroup::new(finding);
            match groups.iter_mut().find(|known| known.has_same_cause(&group)) {
                Some(known) => known.merge(group),
                None => groups.push(group),
            }
        }
        // The stable sort keeps the order of findings within a section.
        let order = [Verdict::Fail, Verdict::Warning, Verdict::Pass, Verdict::NotOffered, Verdict::NotTested];
        groups.sort_by_key(|group| (order.iter().position(|verdict| *verdict == group.verdict), group.consequence));
        groups
    }

    /// Formats the report as text, with or without terminal colours.
    pub fn text(&self, colours: bool) -> String {
        let paint = |code: u8, text: &str| match colours {
            true => format!("\x1b[{code}m{text}\x1b[0m"),
            false => text.into(),
        };
        let mut text = format!("{}: {}\n", self.socket.display(), self.offers);
        let mut section = None;
        for group in self.groups() {
            let here = Some((group.verdict, group.consequence));
            if section != here {
                let title = match (group.verdict, group.consequence) {
                    (Verdict::Warning, Some(consequence)) => {
                        format!("warnings ({})", consequence.description())
                    }
                    (_, Some(consequence)) => consequence.description().into(),
                    (verdict, None) => verdict.to_string(),
                };
                let _ = writeln!(text, "\n{}", paint(1, &title));
                section = here;
            }
            let verdict = paint(colour(group.verdict), &format!("{:12}", group.verdict));
            let rules: Vec<&str> = group.rules.iter().map(|rule| rule.id()).collect();
            let (rules, rings) = (rules.join(","), group.rings.join(", "));
            let more = group.checks.len().saturating_sub(MAX_NAMED_CHECKS);
            let mut checks = group.checks.iter().take(MAX_NAMED_CHECKS).copied().collect::<Vec<_>>().join("; ");
            if more > 0 {
                let _ = write!(checks, "; and {more} more checks");
            }
            let _ = writeln!(text, "{rules:5} {verdict} {rings:15} {checks}: {}", group.seen);
        }
        let all = [Verdict::Fail, Verdict::Warning, Verdict::Pass, Verdict::NotOffered, Verdict::NotTested];
        let counts: Vec<String> = all.iter().map(|verdict| format!("{} {verdict}", self.count(*verdict))).collect();
        let _ = write!(text, "\nchecks: {}", counts.join(", "));
        if let Some(broken) = self.groups().iter().find(|group| group.verdict == Verdict::Fail) {
            let rule = broken.rules.first().map_or("", |rule| rule.id());
            let _ = write!(text, "\nRun 'vhost-migrate check --explain {rule}' for the rule, its purpose and advice");
        }
        text
    }
}

/// Formats the report as text without colours.
impl fmt::Display for CheckReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text(false))
    }
}

/// Escapes text for XML, including attributes. Replaces characters that XML cannot represent.
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
        Finding { seconds: 0.5, ..Finding::new(Rule::R3, "drain", Outcome(verdict, seen.into())) }
    }

    #[test]
    fn the_verdict_of_a_rule_is_its_worst_finding() {
        let findings = vec![finding(Verdict::Pass, ""), finding(Verdict::Fail, ""), finding(Verdict::NotTested, "")];
        let mut report = CheckReport { socket: "s".into(), offers: String::new(), findings };
        assert_eq!(report.rules(), BTreeMap::from([(Rule::R3, Verdict::Fail)]));
        assert!(report.has_failures());
        report.findings.retain(|finding| finding.verdict != Verdict::Fail);
        assert_eq!(report.rules(), BTreeMap::from([(Rule::R3, Verdict::Pass)]));
        assert!(!report.has_failures());
    }

    #[test]
    fn findings_of_one_cause_are_one_row_and_failures_come_first() {
        let found = |rule, what, rings, verdict, seen: &str| Finding {
            rings,
            ..Finding::new(rule, what, Outcome(verdict, seen.into()))
        };
        let mut findings = vec![
            found(Rule::F2, "flags", "", Verdict::Pass, "22 replies"),
            found(Rule::F5, "unknown", "", Verdict::Fail, "it hung up"),
            Finding::after("F5 unknown".into(), "it ended with 1".into()),
            Finding::after("P1 postcopy".into(), "it ended with 1".into()),
            Finding { hostile: true, ..found(Rule::C1, "hostile: configuration", "", Verdict::Fail, "no answer") },
            found(Rule::I3, "hang-ups", "split", Verdict::Fail, "20 requests without answer"),
            found(Rule::I3, "hang-ups", "packed", Verdict::Fail, "7 requests were answered twice"),
            found(Rule::L1, "data", "split", Verdict::Fail, "5 of 9 changed pages are not marked"),
            found(Rule::L9, "another log", "packed", Verdict::Fail, "31 of 90 changed pages are not marked"),
            found(Rule::L2, "offset", "split", Verdict::Warning, "7 pages for nothing"),
        ];
        for rule in [Rule::T1, Rule::T2, Rule::T3, Rule::T4, Rule::T5] {
            findings.push(found(rule, rule.id(), "split", Verdict::NotOffered, "ACCESS_PLATFORM is not offered"));
        }
        let report = CheckReport { socket: "s".into(), offers: "o".into(), findings };
        let text = report.text(false);
        let lines: Vec<&str> = text.lines().filter(|line| !line.is_empty()).collect();
        let expected = [
            "s: o",
            "live migration loses pages",
            "L1,L9 fail         split, packed   data; another log: 5 of 9 changed pages are not marked",
            "a restart loses requests",
            "R9    fail                         F5 unknown; P1 postcopy: it ended with 1",
            "I3    fail         split, packed   hang-ups: 20 requests without answer",
            "a hostile guest or front-end crashes it",
            "C1    fail                         hostile: configuration: no answer",
            "some front-ends do not work with it",
            "F5    fail                         unknown: it hung up",
            "warnings (live migration loses pages)",
            "L2    warning      split           offset: 7 pages for nothing",
            "pass",
            "F2    pass                         flags: 22 replies",
            "not offered",
            "T1,T2,T3,T4,T5 not offered  split           T1; T2; and 3 more checks: ACCESS_PLATFORM is not offered",
            "checks: 8 fail, 1 warning, 1 pass, 5 not offered, 0 not tested",
            "Run 'vhost-migrate check --explain L1' for the rule, its purpose and advice",
        ];
        assert_eq!(lines, expected, "{text}");
        let coloured = report.text(true);
        assert!(coloured.contains("\x1b[31mfail        \x1b[0m") && !text.contains('\x1b'), "{coloured}");
    }

    #[test]
    fn junit_text_is_escaped() {
        let report = CheckReport {
            socket: "a<&>\"'".into(),
            offers: String::new(),
            findings: vec![finding(Verdict::Fail, "<b>&\"'\n\0\u{ffff}"), finding(Verdict::Pass, "]]>")],
        };
        let xml = report.junit();
        assert!(xml.contains("name=\"vhost-migrate check a&lt;&amp;&gt;&quot;&apos;\" tests=\"2\" failures=\"1\""));
        assert!(xml.contains("message=\"&lt;b&gt;&amp;&quot;&apos;&#10;\u{fffd}\u{fffd}\""), "{xml}");
        assert!(xml.contains("<system-out>pass: ]]&gt;</system-out>"), "{xml}");
    }
}
