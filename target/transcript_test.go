package target_test

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/thaw-project/thaw/target"
)

// TestTranscripts sends what is in testdata/*.txt over the socket and compares the
// answers. A line "> x" is sent as it is, "< y" is the whole answer, "<" alone means that
// none comes, "#" is a comment, "! file NAME BYTES" makes a sparse file. Each UUID is
// written $u1, $u2, ... in order of appearance, in requests too; $dir is a directory, and
// $port a free port. -update writes the answers that came.
func TestTranscripts(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatal("no transcripts", err)
	}
	for _, f := range files {
		t.Run(strings.TrimSuffix(filepath.Base(f), ".txt"), func(t *testing.T) { transcript(t, f) })
	}
}

var (
	uuidText = regexp.MustCompile(`[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}`)
	nguid    = regexp.MustCompile(`"nguid":"([0-9A-F]{32})"`)
)

// player replaces what differs from run to run.
type player struct {
	dir, port string
	ids       []string
}

func (p *player) expand(line string) string {
	for i := len(p.ids); i > 0; i-- {
		line = strings.ReplaceAll(line, fmt.Sprintf("$u%d", i), p.ids[i-1])
	}
	return strings.NewReplacer("$dir", p.dir, "$port", p.port).Replace(line)
}

func (p *player) normalise(answer string) string {
	answer = uuidText.ReplaceAllStringFunc(answer, p.number)
	answer = nguid.ReplaceAllStringFunc(answer, func(s string) string {
		h := strings.ToLower(nguid.FindStringSubmatch(s)[1])
		return `"nguid":"` + p.number(h[:8]+"-"+h[8:12]+"-"+h[12:16]+"-"+h[16:20]+"-"+h[20:]) + `"`
	})
	return strings.NewReplacer(p.dir, "$dir", `"`+p.port+`"`, `"$port"`).Replace(answer)
}

func (p *player) number(id string) string {
	for i, o := range p.ids {
		if o == id {
			return fmt.Sprintf("$u%d", i+1)
		}
	}
	p.ids = append(p.ids, id)
	return fmt.Sprintf("$u%d", len(p.ids))
}

func transcript(t *testing.T, path string) {
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	l := start(t, target.Options{MallocBytes: 1 << 30})
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_, port, _ := net.SplitHostPort(free.Addr().String())
	free.Close()
	p := &player{dir: shortDir(t), port: port}
	var out bytes.Buffer
	var nc net.Conn
	var answers *bufio.Reader
	lines := strings.Split(strings.TrimSuffix(string(text), "\n"), "\n")
	for n := 0; n < len(lines); n++ {
		line := lines[n]
		switch {
		case strings.HasPrefix(line, "! file "):
			var name string
			var size int64
			if _, err := fmt.Sscanf(line, "! file %s %d", &name, &size); err != nil {
				t.Fatalf("line %d: %v", n+1, err)
			}
			file(t, p.dir, name, size)
		case strings.HasPrefix(line, "> "):
			if nc == nil {
				if nc, err = net.Dial("unix", l.socket); err != nil {
					t.Fatal(err)
				}
				defer nc.Close()
				answers = bufio.NewReader(nc)
			}
			if _, err := nc.Write([]byte(p.expand(line[2:]) + "\n")); err != nil {
				t.Fatalf("line %d: %v", n+1, err)
			}
		case strings.HasPrefix(line, "<"):
			got := "<"
			if line != "<" {
				nc.SetReadDeadline(time.Now().Add(30 * time.Second))
				answer, err := answers.ReadString('\n')
				if err != nil {
					t.Fatalf("line %d: answer %q, %v", n+1, answer, err)
				}
				if !json.Valid([]byte(answer)) {
					t.Errorf("line %d: not JSON: %s", n+1, answer)
				}
				got = "< " + p.normalise(strings.TrimSuffix(answer, "\n"))
			}
			if got != line && !*update {
				t.Errorf("line %d:\n got %s\nwant %s", n+1, got, line)
			}
			line = got
		}
		out.WriteString(line + "\n")
	}
	if *update {
		if err := os.WriteFile(path, out.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}
