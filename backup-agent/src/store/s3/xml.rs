//! The XML of an answer as elements with their text. Services differ in namespaces, prefixes and attributes, so those are
//! left out. An answer that breaks off is none.

use xmlparser::{ElementEnd, Token, Tokenizer};

/// Levels of elements; S3 has four.
const DEEPEST: usize = 16;

/// An element without its attributes.
#[derive(Debug, Default)]
pub struct Element {
    pub name: String,
    text: String,
    children: Vec<Element>,
}

impl Element {
    /// The text of the first child of that name.
    pub fn text(&self, name: &str) -> Option<&str> {
        let found = self.children.iter().find(|child| child.name == name);
        Some(found?.text.trim()).filter(|text| !text.is_empty())
    }

    pub fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Self> {
        let children = self.children.iter();
        children.filter(move |child| child.name == name)
    }

    /// The text of the element itself.
    pub fn own_text(&self) -> &str {
        &self.text
    }

    /// The first element of that name in the document.
    pub fn find(&self, name: &str) -> Option<&Self> {
        if self.name == name {
            return Some(self);
        }
        self.children.iter().find_map(|child| child.find(name))
    }
}

/// Parses a whole document; `None` when it is not well-formed or has a document type.
pub fn parse(bytes: &[u8]) -> Option<Element> {
    let text = std::str::from_utf8(bytes).ok()?;
    // Some services send spaces while they work.
    let text = text.trim_start_matches(|c: char| c == '\u{feff}' || c.is_whitespace());
    let mut open: Vec<Element> = Vec::new();
    let mut root = None;
    for token in Tokenizer::from(text) {
        let ended = match token.ok()? {
            Token::ElementStart { local, .. } => {
                if root.is_some() || open.len() == DEEPEST {
                    return None;
                }
                open.push(Element {
                    name: local.as_str().to_owned(),
                    ..Element::default()
                });
                None
            }
            Token::ElementEnd { end, .. } => match end {
                ElementEnd::Open => None,
                ElementEnd::Empty => open.pop(),
                ElementEnd::Close(_, local) => Some(
                    open.pop()
                        .filter(|element| element.name == local.as_str())?,
                ),
            },
            Token::Text { text } => {
                let place = open.last_mut()?;
                place.text.push_str(&unescape(text.as_str())?);
                None
            }
            Token::Cdata { text, .. } => {
                open.last_mut()?.text.push_str(text.as_str());
                None
            }
            Token::Attribute { .. }
            | Token::Comment { .. }
            | Token::Declaration { .. }
            | Token::ProcessingInstruction { .. } => None,
            _ => return None,
        };
        if let Some(element) = ended {
            match open.last_mut() {
                Some(parent) => parent.children.push(element),
                None => root = Some(element),
            }
        }
    }
    root.filter(|_| open.is_empty())
}

/// Text for a document of ours.
pub fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

/// Replaces references to characters; a name that XML does not define makes the text none.
fn unescape(text: &str) -> Option<String> {
    let mut plain = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('&') {
        let (name, after) = after.split_once(';')?;
        plain.push_str(before);
        plain.push(match name {
            "amp" => '&',
            "lt" => '<',
            "gt" => '>',
            "quot" => '"',
            "apos" => '\'',
            number => {
                let number = number.strip_prefix('#')?;
                let code = match number.strip_prefix(['x', 'X']) {
                    Some(digits) => u32::from_str_radix(digits, 16),
                    None => number.parse(),
                };
                char::from_u32(code.ok()?)?
            }
        });
        rest = after;
    }
    plain.push_str(rest);
    Some(plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn namespaces_prefixes_and_declarations_make_no_difference() {
        for text in [
            "<R><K>a</K></R>",
            "<R xmlns='http://s3.amazonaws.com/doc/2006-03-01/'><K>a</K></R>",
            "<R xmlns=\"http://s3.example/2024\" other='1'><K>a</K><Other><K>b</K></Other></R>",
            "<s3:R xmlns:s3='http://x/'><s3:K>a</s3:K></s3:R>",
            "<s3:R><s3:K>a</s3:K></s3:R>",
            "\u{feff}<?xml version='1.0' encoding='UTF-8' standalone='yes'?>\n<!-- c --><R>\n  <K>\n a </K>\n</R>\n",
            " \n\n<?xml version=\"1.0\"?><R><K><![CDATA[a]]></K></R>",
            "<?xml version='1.0'?><?style x?><R><K/><E/><K>b</K></R>",
        ] {
            let root = parse(text.as_bytes()).unwrap_or_else(|| panic!("{text}"));
            assert_eq!(root.name, "R", "{text}");
            let want = (!text.contains("<E/>")).then_some("a");
            assert_eq!(root.text("K"), want, "{text}");
        }
    }

    #[test]
    fn what_breaks_off_or_is_no_xml_is_none() {
        let whole = "<?xml version='1.0'?><R><K>a &amp; b</K><L/></R>";
        assert!(parse(whole.as_bytes()).is_some());
        for end in 0..whole.len() {
            assert!(
                parse(&whole.as_bytes()[..end]).is_none(),
                "{}",
                &whole[..end]
            );
        }
        let deep = format!("{}{}", "<a>".repeat(99), "</a>".repeat(99));
        for text in [
            "<html><body><br></body></html>",
            "<!DOCTYPE html><html></html>",
            "<a></b>",
            "<a/><b/>",
            "{\"a\": 1}",
            "<a>&other;</a>",
            &deep,
        ] {
            assert!(parse(text.as_bytes()).is_none(), "{text}");
        }
        assert!(parse(b"<a>\xff</a>").is_none());
    }

    #[test]
    fn references_are_replaced() {
        let root = parse(b"<a><k>&lt;&#x41;&#66;&gt;&quot;&apos;&amp;</k></a>").expect("it is XML");
        assert_eq!(root.text("k"), Some("<AB>\"'&"));
        assert_eq!(escape("<\"&\">"), "&lt;\"&amp;\"&gt;");
    }
}
