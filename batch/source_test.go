package batch

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"testing/iotest"
	"unicode/utf16"
)

func rowsOf(t testing.TB, name, data, template string) (*Source, error) {
	t.Helper()
	tpl, err := ParseTemplate([]byte(template))
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), name)
	write(t, path, data)
	s, err := OpenRows(path, nil, UTF8, tpl)
	if err == nil {
		t.Cleanup(s.Close)
	}
	return s, err
}

// bodies returns the requests of a source, or their errors, each with its line.
func bodies(t testing.TB, s *Source) []string {
	t.Helper()
	var all []string
	for it, err := range s.items() {
		if err != nil {
			return append(all, "end: "+err.Error())
		}
		if it.index != len(all) {
			t.Fatalf("item %d comes at place %d", it.index, len(all))
		}
		if r, err := s.request(it); err != nil {
			all = append(all, err.Error())
		} else {
			all = append(all, fmt.Sprintf("%d %s", it.line, r.body))
		}
	}
	return all
}

func TestRows(t *testing.T) {
	const template = `{ "model": "m", "prompt": "{{ name }}: {{text}}" }`
	for _, c := range []struct {
		name, data string
		want       []string
	}{
		{"plain.csv", "name,text\na,b\nc,d\n", []string{`2 {"model":"m","prompt":"a: b"}`, `3 {"model":"m","prompt":"c: d"}`}},
		{"no line end.csv", "name,text\na,b", []string{`2 {"model":"m","prompt":"a: b"}`}},
		{"BOM and CRLF.csv", "\xef\xbb\xbfname,text\r\na,b\r\n\r\nc,d\r\n", []string{`2 {"model":"m","prompt":"a: b"}`, `4 {"model":"m","prompt":"c: d"}`}},
		{"quotes.csv", "name,text\n\"a \"\"b\"\"\",\"1,\n2\"\n<c>,\\d\n", []string{`2 {"model":"m","prompt":"a \"b\": 1,\n2"}`, `4 {"model":"m","prompt":"<c>: \\d"}`}},
		{"columns in any order.csv", "more,text,name\n1,b,a\n", []string{`2 {"model":"m","prompt":"a: b"}`}},
		{"tabs.tsv", "name\ttext\na,x\tb\n", []string{`2 {"model":"m","prompt":"a,x: b"}`}},
		{"a column is missing.csv", "name,text\na\nc,d\n", []string{"line 2: the row has not the 2 columns that the first line names", `3 {"model":"m","prompt":"c: d"}`}},
		{"a bare quote.csv", "name,text\na\"b,c\nc,d\n", []string{`line 2: bare " in non-quoted-field`, `3 {"model":"m","prompt":"c: d"}`}},
		{"objects.jsonl", "{\"name\":\"a\\u00e9\",\"text\":1.50}\n\n{\"text\":null,\"name\":{\"x\":\"y\"}}\n", []string{`1 {"model":"m","prompt":"a\u00e9: 1.50"}`, `3 {"model":"m","prompt":"{\"x\":\"y\"}: "}`}},
		{"empty trailing columns.csv", "name,text,,\na,b,,\nc,d\ne,f,,,, \n", []string{`2 {"model":"m","prompt":"a: b"}`, `3 {"model":"m","prompt":"c: d"}`, `4 {"model":"m","prompt":"e: f"}`}},
		{"columns without names.csv", ",name, ,text\n1,a,2,b\n", []string{`2 {"model":"m","prompt":"a: b"}`}},
		{"more than the columns.csv", "name,text,\na,b,,c\na,b,c\nc,d,\"\"\n", []string{
			"line 2: the row has not the 2 columns that the first line names", "line 3: the row has not the 2 columns that the first line names", `4 {"model":"m","prompt":"c: d"}`}},
		{"no end of a quote.csv", "name,text\na,b\n\n\"x\n\"\"y\",\"é,\n\nc,d\n\n", []string{
			`2 {"model":"m","prompt":"a: b"}`, "line 4: the quote that opens on line 5, column 6, is not closed by the end of the file, line 7"}},
		{"no end of a quote, nor of the line.csv", "name,text\r\n\"a,b\r\nc,d", []string{"line 2: the quote that opens on line 2, column 1, is not closed by the end of the file, line 3"}},
		{"a quote is missing.csv", "name,text\na,\"b\nc,é \"d\"\ne,f\n", []string{
			"line 2: the quote that opens on line 2, column 3, ends on line 3, column 5, in the middle of a field: is one missing before, or is it to be doubled?", `4 {"model":"m","prompt":"e: f"}`}},
		{"a quote is not doubled.csv", "name,text\n\"a\"\"\",\"b\"c\"\ne,f\n", []string{
			"line 2: the quote that opens on line 2, column 7, ends on line 2, column 9, in the middle of a field: is one missing before, or is it to be doubled?", `3 {"model":"m","prompt":"e: f"}`}},
		{"not UTF-8.csv", "name,text\na,b\n\"é\nM\xfcller\",d\ne,f\n", []string{
			`2 {"model":"m","prompt":"a: b"}`, "line 4, column 2: byte 0xFC is not UTF-8: save it as UTF-8, or say what it is (--encoding windows-1252, for instance)", `5 {"model":"m","prompt":"e: f"}`}},
		{"not UTF-8.jsonl", "\xef\xbb\xbf{\"name\":\"\xc3\",\"text\":1}\n{\"name\":\"\uFFFD\",\"text\":2}\n", []string{
			"line 1, column 10: byte 0xC3 is not UTF-8: save it as UTF-8, or say what it is (--encoding windows-1252, for instance)", "2 {\"model\":\"m\",\"prompt\":\"\uFFFD: 2\"}"}},
		{"a field is missing.jsonl", `{"name":"a"}`, []string{"line 1: the template's field {{text}} is not in the row"}},
		{"no object.jsonl", "[]\n{\"name\":1,\"text\":2}{}\n", []string{"line 1: not a JSON object", "line 2: more text after the object"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			s, err := rowsOf(t, c.name, c.data, template)
			if err != nil {
				t.Fatal(err)
			}
			if got := bodies(t, s); fmt.Sprintf("%q", got) != fmt.Sprintf("%q", c.want) {
				t.Errorf("got  %q\nwant %q", got, c.want)
			}
		})
	}
	for data, want := range map[string]string{
		"name,txt\na,b\n":     "no column is called \"text\", as the template's {{text}} wants; there are: name, txt",
		"name,text,name\n":    `two columns are called "name"`,
		"":                    "the line that names the columns: EOF",
		",, \na,b,c\n":        "no column has a name",
		"name,\"text\na,b\n":  "the line that names the columns: the quote that opens on line 1, column 6, is not closed by the end of the file, line 2",
		"name,t\xe9xt\na,b\n": "the line that names the columns: line 1, column 7: byte 0xE9 is not UTF-8",
		"\xff\xfen\x00a\x00,": "line 1, column 1: the first bytes say that it is utf-16, not utf-8: say so (--encoding utf-16)",
	} {
		if _, err := rowsOf(t, "rows.csv", data, template); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", data, err, want)
		}
	}
}

// TestEndlessRow: an endless row is reported with the line of its beginning. (The limit is that of
// a row, since no test has 64 MiB of text.)
func TestEndlessRow(t *testing.T) {
	s, err := rowsOf(t, "rows.csv", "name,text\na,b\n\n\"c\nd\",e\nf,\"g\n", `{"model":"m","prompt":"{{name}}"}`)
	if err != nil {
		t.Fatal(err)
	}
	var offs []int64
	for it := range s.items() {
		offs = append(offs, it.off)
	}
	if got := s.endless(offs[2], errLongLine).Error(); got != "line 6: the row that begins there is longer than 64 MiB: is a quote not closed?" {
		t.Error(got)
	}
}

// TestEncodings: text in another encoding gives the same requests, from a file and from stdin.
func TestEncodings(t *testing.T) {
	const line = `{"model":"m","prompt":"Köln – 5 € 𝄞"}`
	utf16Text := func(order binary.AppendByteOrder, mark bool) (b []byte) {
		if mark {
			b = order.AppendUint16(b, 0xfeff)
		}
		for _, unit := range utf16.Encode([]rune(line + "\n" + line)) {
			b = order.AppendUint16(b, unit)
		}
		return b
	}
	for _, c := range []struct {
		encoding Encoding
		text     string
		want     string
	}{
		{UTF8, line + "\n" + line, line},
		{UTF16, string(utf16Text(binary.LittleEndian, true)), line},
		{UTF16, string(utf16Text(binary.LittleEndian, false)), line},
		{UTF16, string(utf16Text(binary.BigEndian, true)), line},
		{Windows1252, "{\"model\":\"m\",\"prompt\":\"K\xf6ln \x96 5 \x80\"}", `{"model":"m","prompt":"Köln – 5 €"}`},
		{Latin1, "{\"model\":\"m\",\"prompt\":\"K\xf6ln\"}", `{"model":"m","prompt":"Köln"}`},
	} {
		path := filepath.Join(t.TempDir(), "in.jsonl")
		write(t, path, c.text)
		for _, name := range []string{path, "-"} {
			s, err := OpenLines(name, strings.NewReader(c.text), c.encoding)
			if err != nil {
				t.Errorf("%s: %v", c.encoding, err)
				continue
			}
			if got := bodies(t, s); got[0] != "1 "+c.want {
				t.Errorf("%s: %q, want %s", c.encoding, got, c.want)
			}
			s.Close()
		}
	}
	for _, c := range []struct {
		encoding   Encoding
		text, want string
	}{
		{UTF16, "a\x00\n\x00b\x00\x00\xd8c\x00", "line 2, column 2: bytes 0x00 0xD8 are half a character in UTF-16"},
		{UTF16, "a\x00\x00\xdc", "line 1, column 2: bytes 0x00 0xDC are half a character in UTF-16"},
		{UTF16, "\xfe\xff\x00a\xd8\x00", "line 1, column 2: bytes 0xD8 0x00 are half a character in UTF-16"},
		{UTF16, "a\x00b", "line 1, column 2: byte 0x62 at the end is half a character in UTF-16"},
		{UTF16, "\xef\xbb\xbf{}", "line 1, column 1: the first bytes say that it is utf-8, not utf-16: say so (--encoding utf-8)"},
		{Windows1252, "\xef\xbb\xbf{}", "line 1, column 1: the first bytes say that it is utf-8, not windows-1252: say so (--encoding utf-8)"},
		{Windows1252, "ab\n\xfc\x81", "line 2, column 2: byte 0x81 is no character in Windows 1252"},
		{Latin1, "\xff\xfe{\x00", "line 1, column 1: the first bytes say that it is utf-16, not latin1: say so (--encoding utf-16)"},
	} {
		if _, err := OpenLines("-", strings.NewReader(c.text), c.encoding); err == nil || !strings.HasSuffix(err.Error(), "the input -: "+c.want) {
			t.Errorf("%s, %q: %v, want %s", c.encoding, c.text, err, c.want)
		}
	}
}

// TestStdinBroken: a failed copy of stdin leaves no file over.
func TestStdinBroken(t *testing.T) {
	t.Setenv("TMPDIR", t.TempDir())
	if _, err := OpenLines("-", iotest.ErrReader(syscall.ENOSPC), UTF8); !errors.Is(err, syscall.ENOSPC) {
		t.Fatal(err)
	}
	if left, err := os.ReadDir(os.TempDir()); err != nil || len(left) > 0 {
		t.Errorf("%v, %v", left, err)
	}
}

func TestTemplate(t *testing.T) {
	row := map[string]json.RawMessage{"n": json.RawMessage("7"), "s": json.RawMessage(`"a\"b"`), "o": json.RawMessage(`{"k":[1]}`), "z": json.RawMessage("null")}
	for template, want := range map[string]string{
		`{"a":"{{s}}"}`:                            `{"a":"a\"b"}`,
		`{"a":"{{n}}","b":["{{o}}","{{z}}"]}`:      `{"a":7,"b":[{"k":[1]},null]}`,
		`{"a":"<{{n}}|{{o}}|{{z}}|{{ s }}>"}`:      `{"a":"<7|{\"k\":[1]}||a\"b>"}`,
		`{"a":"\\{{n}}","b":"\"{{n}}"}`:            `{"a":"\\7","b":"\"7"}`,
		`{"{{s}}":1}`:                              `{"a\"b":1}`,
		`{"a":"{{{{n}} {{ .Prompt }} {{n}}"}`:      `{"a":"{{n}} {{ .Prompt }} 7"}`,
		"\xef\xbb\xbf{\n \"a\" : \"{{n}}{{n}}\" }": `{"a":"77"}`,
	} {
		tpl, err := ParseTemplate([]byte(template))
		if err != nil {
			t.Errorf("%s: %v", template, err)
			continue
		}
		if got, err := tpl.Fill(row); err != nil || string(got) != want {
			t.Errorf("%s: %s, %v; want %s", template, got, err, want)
		}
	}
	for template, want := range map[string]string{
		"{\"a\":\"{{n}}\",\n\"b\":\"\xe4\"}": "template: line 2, column 6: byte 0xE4 is not UTF-8",
		`{"a":"{{n"}`:                        `has no }}`, `{"a":"{{}}"}`: `names no field`, `{"a":"b"}`: `no field is in it`, `{"a":`: `invalid JSON at byte`, `["{{a}}"]`: "not a JSON object",
	} {
		if _, err := ParseTemplate([]byte(template)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", template, err, want)
		}
	}
}

func TestParseRequest(t *testing.T) {
	for line, want := range map[string]string{
		`{"model":"m","messages":[{"role":"user","content":"x"}]}`:                    "/api/chat m",
		`{"MODEL":"m","prompt":"x"} `:                                                 "/api/generate m",
		`{"model":"m","input":["x"]}`:                                                 "/api/embed m",
		`{"custom_id":"1","url":"/v1/embeddings","body":{"model":"m","input":"x"}}`:   "/v1/embeddings m",
		`{"url":"/v1/embeddings/","method":"post","body":{"model":"m","input":"x"}}`:  "/v1/embeddings m",
		`{"url":"https://example.com/api/chat/","body":{"model":"m","messages":[1]}}`: "/api/chat m",
		`{"model":"m"}`:                                         "neither messages",
		`{"model":"","prompt":"x"}`:                             `no "model" is named`,
		`{"prompt":"x"}`:                                        `no "model" is named`,
		`{"model":"m","prompt":""}`:                             `"prompt" is empty: the request would only load the model`,
		`{"model":"m","messages":[ ]}`:                          `"messages" is empty`,
		`{"model":"m","messages":"x"}`:                          `/api/chat needs "messages", a list`,
		`{"model":"m","prompt":null}`:                           "neither messages",
		`{"url":"/v1/chat/completions"}`:                        `"url" but no "body"`,
		`{"url":"/v1/responses","body":{"model":"m"}}`:          `url "/v1/responses": want one of`,
		`{"url":"/api/chat","method":"GET","body":{}}`:          `method "GET": want POST`,
		`{"url":"/api/chat","body":{"model":"m","prompt":"x"}}`: `/api/chat needs "messages", a list`,
		`{"model":"m","prompt":"x"`:                             "invalid JSON at byte 25: unexpected end",
		"\"x\"":                                                 "not a JSON object",
	} {
		got := ""
		r, err := parseRequest([]byte(line))
		if got = r.path + " " + r.model; err != nil {
			got = err.Error()
		}
		if !strings.HasPrefix(got, want) {
			t.Errorf("%s: %s, want %s", line, got, want)
		}
	}
}

// TestSent: a body is sent unchanged, except for stream.
func TestSent(t *testing.T) {
	for body, want := range map[string]string{
		`{"model":"m","prompt":"x","big":12345678901234567890}`:                                            `{"model":"m","prompt":"x","big":12345678901234567890}`,
		`{"stream":false,"model":"m","prompt":"x","STREAM" : null}`:                                        `{"stream":true,"model":"m","prompt":"x","STREAM" : true}`,
		`{"model":"m","input":"x","stream":false}`:                                                         `{"model":"m","input":"x","stream":false}`,
		`{"url":"/v1/completions","body":{ "model":"m","prompt":"x"}}`:                                     `{"stream":true,"stream_options":{"include_usage":true}, "model":"m","prompt":"x"}`,
		`{"url":"/v1/completions","body":{"stream":false,"stream_options":null,"model":"m","prompt":"x"}}`: `{"stream":true,"stream_options":{"include_usage":true},"model":"m","prompt":"x"}`,
	} {
		r, err := parseRequest([]byte(body))
		if got := string(r.sent()); err != nil || got != want {
			t.Errorf("%s, %v; want %s", got, err, want)
		}
	}
}

// FuzzTemplate: for any row, a template gives JSON that equals the template with the values in it.
func FuzzTemplate(f *testing.F) {
	f.Add(`{"a":"{{x}}","b":"1{{x}}2","{{x}}":[{"c":"{{y}}"}]}`, "text", `{"k":"v"}`)
	f.Add(`{"a":"\"{{x}}\"","b":"\\{{ y }}"}`, "\"\\\x00\u2028<é", "1e5")
	f.Add(`{"a":"{{{{x}}{{x}}"}`, "{{y}}", "null")
	f.Fuzz(func(t *testing.T, template, x, y string) {
		tpl, err := ParseTemplate([]byte(template))
		if err != nil {
			return
		}
		if y = strings.TrimSpace(y); !json.Valid([]byte(y)) {
			y = "null"
		}
		row := map[string]json.RawMessage{}
		for _, name := range tpl.Fields {
			row[name] = quoted(x)
		}
		row["y"] = json.RawMessage(y)
		body, err := tpl.Fill(row)
		if err != nil {
			t.Fatal(err)
		}
		if !json.Valid(body) {
			t.Fatalf("%s with %q and %s: %s", template, x, y, body)
		}
		again, err := tpl.Fill(row)
		if err != nil || !bytes.Equal(body, again) {
			t.Fatalf("%s, then %s", body, again)
		}
		if bytes.Contains(body, []byte("\n")) && !strings.Contains(y, "\n") {
			t.Fatalf("more than one line: %q", body)
		}
	})
}

// FuzzLines: items are the lines that are not blank, at their offsets, whatever the input.
func FuzzLines(f *testing.F) {
	f.Add("{\"model\":\"m\",\"prompt\":\"x\"}\n\n \r\nnonsense\r\n{}")
	f.Add("\xef\xbb\xbf{}\n")
	f.Add("\n\n")
	f.Add("")
	f.Fuzz(func(t *testing.T, text string) {
		path := filepath.Join(t.TempDir(), "in.jsonl")
		write(t, path, text)
		s, err := OpenLines(path, nil, UTF8)
		if err != nil {
			if !strings.Contains(err.Error(), "utf-16") {
				t.Fatal(err)
			}
			return
		}
		defer s.Close()
		var want []string
		var at []int
		for i, line := range strings.SplitAfter(strings.TrimPrefix(text, string(utf8BOM)), "\n") {
			if strings.TrimSpace(line) != "" {
				want, at = append(want, line), append(at, i+1)
			}
		}
		n := 0
		for it, err := range s.items() {
			if err != nil || n >= len(want) {
				t.Fatalf("item %d of %d: %v", n, len(want), err)
			}
			raw, err := s.raw(it)
			if err != nil || string(raw) != want[n] || it.line != at[n] || it.index != n {
				t.Fatalf("item %+v: %q, %v; want line %d, %q", it, raw, err, at[n], want[n])
			}
			if _, err := s.request(it); err != nil {
				if _, fatal := badLine(err); fatal != nil {
					t.Fatal(fatal)
				}
			}
			n++
		}
		if n != len(want) {
			t.Fatalf("%d items, want %d", n, len(want))
		}
	})
}

// FuzzRows: each row of a CSV file is the same when it is read again.
func FuzzRows(f *testing.F) {
	f.Add("a,b\n1,2\n\"x\ny\",\"\"\"\"\n\n3\n")
	f.Add("a\r\n1\r\n\r\n2")
	f.Add("a\n\"x\n")
	f.Fuzz(func(t *testing.T, text string) {
		path := filepath.Join(t.TempDir(), "in.csv")
		write(t, path, text)
		s, err := OpenRows(path, nil, UTF8, &Template{})
		if err != nil {
			return
		}
		defer s.Close()
		end := s.start
		for it, err := range s.items() {
			if err != nil {
				t.Fatal(err)
			}
			if it.off != end || it.size < 0 {
				t.Fatalf("%+v begins not where the last one ended, at %d", it, end)
			}
			end = it.off + int64(it.size)
			raw, err := s.raw(it)
			if err != nil {
				t.Fatal(err)
			}
			if row, err := s.row(raw); it.bad == nil && (err != nil || len(row) != len(s.columns)) {
				t.Fatalf("%q: %v, %v", raw, row, err)
			}
		}
	})
}
