//! Whether a line that somebody else wrote could be taken for one of ours: a JSON object with `ts`, `level` and `msg`.
//!
//! Invariant: whatever a reader of JSON accepts as such an object is recognised; text that no object begins is not.

use super::terminal::{is_invisible, sequence};

/// Our keys, as a bit each.
const KEYS: [&[u8]; 3] = [b"ts", b"level", b"msg"];
const ALL: u8 = 0b111;

/// Goes before what could be taken for ours. Outside of the object: no reader takes the line for JSON then, and no key
/// that is given twice undoes it.
pub const MARK: &[u8] = b"gateway: ";

/// Appends `line`, with the mark wherever something in it could be taken for ours, and says whether its beginning could.
/// `is_cut`: the line goes on, and its end is not known.
pub fn mark(line: &[u8], is_cut: bool, marked: &mut Vec<u8>) -> bool {
    if !line.contains(&b'{') {
        marked.extend_from_slice(line);
        return false;
    }
    let mut begins = is_ours(line, is_cut);
    let mut rest = line;
    while !rest.is_empty() {
        let (segment, next) = rest.split_at(end_of_segment(rest));
        let is_like = is_ours(segment, is_cut && next.is_empty());
        if rest.len() == line.len() {
            begins |= is_like;
        } else if is_like {
            marked.extend_from_slice(MARK);
        }
        marked.extend_from_slice(segment);
        rest = next;
    }
    begins
}

/// Whether there is nothing visible yet after the last place where some reader begins a line.
pub fn is_blank_at_end(line: &[u8]) -> bool {
    let mut rest = line;
    loop {
        let (segment, next) = rest.split_at(end_of_segment(rest));
        if next.is_empty() {
            return first_visible(segment).is_none();
        }
        rest = next;
    }
}

/// Some readers take other characters than a line feed for the end of a line: Python's `splitlines` takes all of these but the
/// control sequences of terminals.
fn end_of_segment(line: &[u8]) -> usize {
    let ends = |index: usize| match line[index] {
        b'\t' => None,
        // A line feed that follows belongs to it.
        b'\r' if line.get(index + 1) == Some(&b'\n') => None,
        // A terminal may go anywhere with it, and some readers take it out.
        0x1b | 0xc2 if sequence(&line[index..]) > 0 => Some(sequence(&line[index..])),
        0..b' ' => Some(1),
        0xe2 if line[index..].starts_with("\u{2028}".as_bytes()) => Some(3),
        0xe2 if line[index..].starts_with("\u{2029}".as_bytes()) => Some(3),
        _ => None,
    };
    let mut found = (0..line.len()).filter_map(|index| Some(index + ends(index)?));
    found.next().unwrap_or(line.len())
}

/// Where the text begins when blanks, control characters and byte order marks are stripped, and what is not text.
fn first_visible(text: &[u8]) -> Option<usize> {
    let mut index = 0;
    for chunk in text.utf8_chunks() {
        let is_blank = |c: char| c.is_whitespace() || c.is_control() || is_invisible(c);
        if let Some(found) = chunk.valid().find(|c| !is_blank(c)) {
            return Some(index + found);
        }
        index += chunk.valid().len() + chunk.invalid().len();
    }
    None
}

fn is_ours(text: &[u8], is_cut: bool) -> bool {
    let begins = first_visible(text).filter(|index| text[*index] == b'{');
    begins.is_some_and(|index| is_cut || has_our_keys(&text[index..]))
}

/// Reads more than is JSON, without recursion: readers differ in what they forgive, such as a number that is none, or text
/// after the object.
fn has_our_keys(text: &[u8]) -> bool {
    let (mut depth, mut found) = (0_usize, 0);
    let mut index = 0;
    while let Some(&byte) = text.get(index) {
        index += 1;
        match byte {
            b'{' | b'[' => {
                depth += 1;
                if depth == 1 {
                    found = 0;
                }
            }
            b'}' | b']' => depth = depth.saturating_sub(1),
            b'"' => {
                let string = &text[index..];
                let end = end_of_string(string);
                index += end + 1;
                let after = text.get(index..).unwrap_or_default();
                let follows = after.iter().find(|byte| !byte.is_ascii_whitespace());
                if depth == 1 && follows == Some(&b':') {
                    found |= bit(&string[..end]);
                    if found == ALL {
                        return true;
                    }
                }
            }
            _ => {}
        }
    }
    false
}

/// Where the quote is that ends a string.
fn end_of_string(text: &[u8]) -> usize {
    let mut is_escaped = false;
    let end = text.iter().position(|byte| {
        let is_end = *byte == b'"' && !is_escaped;
        is_escaped = *byte == b'\\' && !is_escaped;
        is_end
    });
    end.unwrap_or(text.len())
}

/// Which of our keys this is, with its escapes. Some decoders match names whatever their case.
fn bit(key: &[u8]) -> u8 {
    let mut name = [0; 5];
    let (mut length, mut rest) = (0, key);
    while let [first, after @ ..] = rest {
        let (byte, taken) = match (first, after) {
            (b'\\', [b'u', b'0', b'0', digits @ ..]) if digits.len() >= 2 => {
                let digits = std::str::from_utf8(&digits[..2]).unwrap_or_default();
                (u8::from_str_radix(digits, 16).unwrap_or_default(), 6)
            }
            _ => (*first, 1),
        };
        let Some(place) = name.get_mut(length) else {
            return 0;
        };
        *place = byte;
        length += 1;
        rest = &rest[taken..];
    }
    let is_it = |known: &[u8]| name[..length].eq_ignore_ascii_case(known);
    KEYS.iter()
        .position(|known| is_it(known))
        .map_or(0, |index| 1 << index)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn marked(line: &str, is_cut: bool) -> String {
        let mut text = Vec::new();
        let begins = mark(line.as_bytes(), is_cut, &mut text);
        let text = String::from_utf8(text).expect("was text");
        if begins {
            format!("gateway: {text}")
        } else {
            text
        }
    }

    #[test]
    fn what_a_terminal_hides_does_not_hide_a_line() {
        let ours = r#"{"ts":1,"level":2,"msg":3}"#;
        for hidden in [
            "\u{1b}[31m",
            "\u{1b}[1A\u{1b}[2K",
            "x\r\u{1b}[K",
            "\u{9b}2J",
        ] {
            let line = format!("{hidden}{ours}\n");
            assert_eq!(marked(&line, false), format!("{hidden}gateway: {ours}\n"));
        }
        for hidden in ["\u{200b}", "\u{202e} "] {
            let line = format!("{hidden}{ours}\n");
            assert_eq!(marked(&line, false), format!("gateway: {line}"));
        }
    }

    #[test]
    fn what_a_reader_of_json_could_take_for_ours_is_marked() {
        for line in [
            r#"{"ts":"1","level":"info","msg":"x"}"#,
            r#"{"msg":"x","pid":[{"a":"}"}],"level":null,"ts":1}"#,
            "  \t{ \"ts\" : 1 , \"level\" :\t2, \"msg\":3 }",
            "\u{feff}\u{a0}\u{2003}{\"ts\":1,\"level\":2,\"msg\":3}",
            r#"{"\u0074s":1,"l\u0065vel":2,"\u006d\u0073\u0067":3}"#,
            r#"{"ts":1,"level":2,"msg":3,"ts":4,"from":"supervisor"}"#,
            // Readers that forgive.
            r#"{"ts":1,"level":2,"msg":3} and more"#,
            r#"{} {"ts":1,"level":2,"msg":3}"#,
            r#"{"ts":NaN,"level":-Infinity,"msg":'3',}"#,
            r#"{"TS":1,"Level":2,"Msg":3}"#,
            r#"{"ts":1,"level":2,"msg":"without an end"#,
            // A return is white space of JSON.
            "{\"ts\":1,\r\"level\":2,\r\"msg\":3}",
        ] {
            for end in ["", "\n", "\r\n"] {
                let line = format!("{line}{end}");
                assert_eq!(marked(&line, false), format!("gateway: {line}"));
            }
        }
        let deep = format!(
            r#"{{"x":{}{},"ts":1,"level":2,"msg":3}}"#,
            "[".repeat(5000),
            "]".repeat(5000)
        );
        assert_eq!(marked(&deep, false), format!("gateway: {deep}"));
        let invalid = b"\xff{\"ts\":\"\xfe\",\"level\":2,\"msg\":3}";
        assert!(mark(invalid, false, &mut Vec::new()));
    }

    #[test]
    fn what_follows_another_end_of_a_line_is_marked_there() {
        let forged = r#"{"ts":1,"level":2,"msg":3}"#;
        for end in [
            "\r", "\u{b}", "\u{c}", "\u{1e}", "\u{85}", "\u{2028}", "\u{2029}",
        ] {
            let line = format!("x{end}{forged}{end} y{end}{end} {forged}\n");
            let expected = format!("x{end}gateway: {forged}{end} y{end}{end}gateway:  {forged}\n");
            assert_eq!(marked(&line, false), expected);
        }
    }

    #[test]
    fn everything_else_is_left_as_it_is() {
        for line in [
            "",
            "a line\n",
            "\u{1b}[31mcolours\u{1b}[0m\r\n",
            "10 %\r20 %\r\n",
            r#"{"time":1,"level":"info","msg":"x"}"#,
            r#"{"data":{"ts":1,"level":2,"msg":3}}"#,
            r#"{"ts":1,"data":{"level":2,"msg":3}}"#,
            r#"{"x":"{\"ts\":1,\"level\":2,\"msg\":3}"}"#,
            r#"{"x":"\\\"","ts":"level","level":"msg"}"#,
            r#"[{"ts":1,"level":2,"msg":3}]"#,
            r#"said: {"ts":1,"level":2,"msg":3}"#,
            r#"{"a":"ts","b":"level","c":"msg"}"#,
            r#"{"tss":1,"levels":2,"\u006dsgs":3,"m\u":4}"#,
        ] {
            assert_eq!(marked(line, false), line);
        }
        assert_eq!(marked("x{\"a\":", true), "x{\"a\":");
    }

    #[test]
    fn an_object_whose_end_is_not_known_could_be_ours() {
        assert_eq!(marked(" {\"a\":1", true), "gateway:  {\"a\":1");
        assert_eq!(marked("x\r{\"a\":1", true), "x\rgateway: {\"a\":1");
        assert_eq!(marked("{\"a\":1}\ry", true), "gateway: {\"a\":1}\ry");
        for (line, is_blank) in [("", true), ("x", false), ("x\r ", true), ("x\r y", false)] {
            assert_eq!(is_blank_at_end(line.as_bytes()), is_blank, "{line:?}");
        }
    }
}
