package daemon

import (
	"os"
	"regexp"
	"strings"
	"testing"
)

// TestDeploymentExamples validates the files of docs/deployment.md for each process that
// their first lines name.
func TestDeploymentExamples(t *testing.T) {
	text, err := os.ReadFile("../docs/deployment.md")
	if err != nil {
		t.Fatal(err)
	}
	found := 0
	for _, block := range regexp.MustCompile("(?s)```toml\n# (.*?): (.*?)\n(.*?)```").FindAllStringSubmatch(string(text), -1) {
		where, processes, file := block[1], block[2], block[3]
		for p := range strings.SplitSeq(processes, ", ") {
			t.Run(where+"/"+p, func(t *testing.T) {
				if p == "command" {
					p = ""
				}
				c, err := loadAs(t, file, Process(p))
				if err != nil {
					t.Fatal(err)
				}
				if len(c.Roles) == 0 {
					t.Errorf("it has no roles: %+v", c)
				}
			})
			found++
		}
	}
	if found < 17 {
		t.Errorf("%d examples found", found)
	}
}
