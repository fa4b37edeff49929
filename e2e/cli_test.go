package e2e

import (
	"encoding/json"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	attacherv1 "github.com/thaw-project/thaw/api/attacher/v1"
)

// TestCommandLine does with the command line what a user does in a day: each verb that
// prints data prints JSON too, what is said of blocks is true, and what is made can be
// removed.
func TestCommandLine(t *testing.T) {
	b := start(t)
	g := b.ground(t)
	before := g.state(t)
	source := g.pushLayers(t, "cli", noise(30, 1<<20), noise(31, 1<<20))
	dest := b.registry.Ref("cli-dest", "thaw")
	do := func(args ...string) string {
		t.Helper()
		out, err := g.server.Do(t.Context(), args...)
		if err != nil {
			t.Fatal(err)
		}
		return string(out)
	}

	t.Run("progress", func(t *testing.T) {
		// Elsewhere than on a terminal: a line for each layer, no bars.
		command := g.server.Command(t.Context(), "image", "convert", "--plain-http", source, dest)
		o := run(t, command)
		if o.code != 0 || strings.Contains(o.stderr, "\x1b") || strings.Count(o.stderr, "\n") != 2 || !strings.Contains(o.stdout, dest+"@sha256:") {
			t.Errorf("exit %d\n%s\n%q", o.code, o.stdout, o.stderr)
		}
		if o = run(t, g.server.Command(t.Context(), "image", "convert", "--plain-http", "--quiet", source, dest)); o.code != 0 || o.stderr != "" || strings.Count(o.stdout, "shared") != 2 {
			t.Errorf("exit %d\n%s\n%q", o.code, o.stdout, o.stderr)
		}
		script, err := exec.LookPath("script")
		if err != nil {
			t.Fatal(err)
		}
		line := strings.Join(g.server.Command(t.Context(), "image", "convert", "--plain-http", source, dest).Args, " ")
		terminal := b.lab.Command(t.Context(), script, "--quiet", "--return", "--command", line, "/dev/null")
		terminal.Env = append(terminal.Env, "TERM=xterm")
		if o = run(t, terminal); o.code != 0 || !strings.Contains(o.stdout, "\x1b[") || !strings.Contains(o.stdout, "====") ||
			strings.LastIndex(o.stdout, "\x1b[") > strings.Index(o.stdout, "LAYER") {
			t.Errorf("on a terminal: exit %d\n%q", o.code, o.stdout)
		}
	})

	image := attacherv1.Image{}
	t.Run("JSON", func(t *testing.T) {
		do("lvol", "create", "one", "16MiB")
		for _, args := range [][]string{
			{"image", "list"}, {"image", "inspect", dest}, {"image", "prune", "--dry-run"}, {"lvol", "list"}, {"lvol", "pool"},
			{"lvol", "check", "--scrub"}, {"lvol", "inspect", "one"}, {"lvol", "resize", "one", "32MiB"}, {"lvol", "snapshot", "one", "two"},
			{"lvol", "clone", "two", "three"}, {"lvol", "inflate", "three"}, {"lvol", "decouple", "one"}, {"lvol", "rename", "three", "four"},
			{"lvol", "delete", "four"}, {"lvol", "delete", "one"}, {"lvol", "delete", "two"}, {"snapshot", "list"},
			{"image", "convert", "--plain-http", "--quiet", source, dest},
		} {
			plain := args[1] == "list" || args[1] == "inspect" || args[1] == "pool"
			if plain {
				if out := do(args...); out == "" || strings.HasPrefix(out, "[") || strings.HasPrefix(out, "{") {
					t.Errorf("thaw %s prints %.200q", strings.Join(args, " "), out)
				}
			}
			out := do(append(args, "--json")...)
			if !json.Valid([]byte(out)) || strings.HasPrefix(out, "null") {
				t.Errorf("thaw %s --json prints %.200q", strings.Join(args, " "), out)
			}
		}
		if err := json.Unmarshal([]byte(do("image", "inspect", dest, "--json")), &image); err != nil || image.Reference != dest || len(image.Blocks) != 3 {
			t.Fatalf("%v: %v", &image, err)
		}
	})

	t.Run("prune", func(t *testing.T) {
		// A conversion whose second layer is damaged leaves the first one's block.
		broken := g.pushLayers(t, "cli-broken", noise(32, 1<<20), noise(33, 1<<20))
		g.harm(t, broken, 1, func(blob []byte) []byte { blob[len(blob)/2] ^= 1; return blob })
		c := bad{code: exitCorrupt, says: []string{"layer 2 of 2"}}
		c.refused(t, run(t, g.server.Command(t.Context(), g.convertArgs(broken, "cli-broken-dest")...)))

		type pruned struct {
			Blocks []string `json:"blocks"`
			DryRun bool     `json:"dry_run"`
		}
		prune := func(args ...string) (p pruned) {
			t.Helper()
			if err := json.Unmarshal([]byte(do(append([]string{"image", "prune", "--json"}, args...)...)), &p); err != nil {
				t.Fatal(err)
			}
			return p
		}
		p := prune("--dry-run")
		if len(p.Blocks) != 1 || !p.DryRun || slices.Contains(image.Blocks, p.Blocks[0]) {
			t.Fatalf("%+v", p)
		}
		if out := do("image", "list"); !strings.Contains(out, "1 block of no image") || !strings.Contains(out, "thaw image prune") {
			t.Errorf("thaw image list does not tell of the block:\n%s", out)
		}
		if out := do("lvol", "check"); !strings.Contains(out, "1 block that no image names") {
			t.Errorf("thaw lvol check does not tell of the block:\n%s", out)
		}
		if young := prune("--older-than", "1h"); len(young.Blocks) != 0 {
			t.Errorf("%v were deleted", young.Blocks)
		}
		if out := do("lvol", "list"); !strings.Contains(out, p.Blocks[0]) {
			t.Errorf("a dry run, or one for older blocks, deleted %s", p.Blocks[0])
		}
		if out := do("image", "prune"); !strings.Contains(out, "deleted "+" "+p.Blocks[0]) || !strings.Contains(out, "1 block deleted") {
			t.Errorf("thaw image prune prints %q", out)
		}
		list := do("lvol", "list")
		if strings.Contains(list, p.Blocks[0]) {
			t.Errorf("%s is still there", p.Blocks[0])
		}
		for _, name := range image.Blocks {
			if !strings.Contains(list, name) {
				t.Errorf("block %s of an image was pruned", name)
			}
		}
	})

	t.Run("completion", func(t *testing.T) {
		complete := func(args ...string) []string {
			t.Helper()
			out, err := b.lab.Command(t.Context(), "thaw", append([]string{"__complete"}, args...)...).Output()
			if err != nil {
				t.Fatal(err)
			}
			return strings.Split(strings.TrimSpace(string(out)), "\n")
		}
		at := []string{"--root", g.server.Root, "--run", g.server.Run}
		for _, verb := range []string{"inspect", "remove"} {
			if got := complete(append(append([]string{"image", verb}, at...), "")...); !slices.Contains(got, dest) {
				t.Errorf("image %s: %q", verb, got)
			}
		}
		if got := complete(append(append([]string{"lvol", "delete"}, at...), "")...); !slices.Contains(got, image.Blocks[0]) {
			t.Errorf("lvol delete: %q", got)
		}
		if got := complete("image", "convert", "--mode", ""); !slices.Contains(got, "overlaybd") {
			t.Errorf("--mode: %q", got)
		}
		nowhere := filepath.Join(g.dir, "nowhere")
		if got := complete("lvol", "delete", "--run", nowhere, ""); len(got) != 1 {
			t.Errorf("without a server: %q", got)
		}
	})

	if out := do("image", "remove", dest); !strings.Contains(out, "3 blocks deleted") {
		t.Errorf("thaw image remove prints %q", out)
	}
	before.Tags = append(before.Tags, filepath.Join(b.registry.Dir, "docker/registry/v2/repositories/cli-dest/_manifests/tags/thaw"))
	slices.Sort(before.Tags)
	g.unchanged(t, before)
}
