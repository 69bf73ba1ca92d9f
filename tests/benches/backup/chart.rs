//! A bar plot as SVG, readable on light and on dark.

use std::fmt::Write as _;

const WIDTH: f64 = 720.0;
/// Where bars begin, and the longest of them.
const LEFT: f64 = 150.0;
const LONGEST: f64 = 480.0;
const BAR: f64 = 16.0;
const GAP: f64 = 26.0;
const TITLE: f64 = 34.0;

/// Groups of bars, each group on a scale of its own: from nothing to its largest. The first bar of each stands out.
pub fn bars(title: &str, groups: &[(&str, Vec<(&str, f64)>)]) -> String {
    let count: usize = groups.iter().map(|(_, bars)| bars.len()).sum();
    let height = TITLE + groups.len() as f64 * GAP + count as f64 * (BAR + 4.0) + 8.0;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" height=\"{height}\" role=\"img\" aria-label=\"{title}\">\n\
         <style>\n\
         text {{ font: 12px system-ui, sans-serif; fill: #1f2328 }}\n\
         .title {{ font-weight: 600; font-size: 14px }} .group {{ font-weight: 600 }} .name {{ text-anchor: end }}\n\
         .own {{ fill: #0969da }} .peer {{ fill: #afb8c1 }}\n\
         @media (prefers-color-scheme: dark) {{ text {{ fill: #e6edf3 }} .own {{ fill: #58a6ff }} .peer {{ fill: #6e7681 }} }}\n\
         </style>\n\
         <text class=\"title\" x=\"12\" y=\"22\">{title}</text>\n"
    );
    let mut y = TITLE;
    // A string takes everything.
    for (group, bars) in groups {
        let _ = writeln!(
            svg,
            "<text class=\"group\" x=\"12\" y=\"{:.0}\">{group}</text>",
            y + 16.0
        );
        y += GAP;
        let largest = bars.iter().map(|(_, value)| *value).fold(0.0, f64::max);
        for (at, (name, value)) in bars.iter().enumerate() {
            let class = if at == 0 { "own" } else { "peer" };
            let width = (value / largest * LONGEST).max(1.0);
            let line = y + BAR - 4.0;
            let _ = writeln!(
                svg,
                "<text class=\"name\" x=\"{:.0}\" y=\"{line:.0}\">{name}</text>\
                 <rect class=\"{class}\" x=\"{LEFT}\" y=\"{y:.0}\" width=\"{width:.1}\" height=\"{BAR}\" rx=\"2\"/>\
                 <text x=\"{:.1}\" y=\"{line:.0}\">{value:.3}</text>",
                LEFT - 8.0,
                LEFT + width + 6.0
            );
            y += BAR + 4.0;
        }
    }
    svg.push_str("</svg>\n");
    svg
}
