package e2e

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	attacherv1 "github.com/thaw-project/thaw/api/attacher/v1"
	"github.com/thaw-project/thaw/attacher/rpc"
	"github.com/thaw-project/thaw/e2e/lab"
	"github.com/thaw-project/thaw/e2e/recipe"
	"github.com/thaw-project/thaw/image/convert"
)

// elsewhere is an attacher in a process of its own, which converters on other machines may
// call.
type elsewhere struct {
	*cluster
	flags []string // of thaw image convert, for a machine that may
}

func newElsewhere(t *testing.T, b *bench) *elsewhere {
	t.Helper()
	c := &cluster{b: b, ca: filepath.Join(t.TempDir(), "ca")}
	c.thaw(t, "certificate", "authority", "--out", c.ca)
	store := c.issue(t, storeTarget, "--address", "127.0.0.1")
	attacher, nvme := freePort(t), freePort(t)
	c.store = b.thawWith(t, lab.ThawOptions{StoreOnly: true, Parts: []string{"attacher"}, PartBefore: unitsBefore(t), Config: fmt.Sprintf(`
roles = ["store"]
target = %q
[export]
nvme_tcp = [%q]
attacher = %q
certificate = %q
key = %q
client_ca = %q
converters = ["ci"]
`, storeTarget, nvme, attacher, store+".crt", store+".key", filepath.Join(c.ca, "ca.crt"))})
	return &elsewhere{c, c.flags(t, "ci", attacher)}
}

// flags are those by which a machine of that name converts at an attacher.
func (c *cluster) flags(t *testing.T, name, attacher string) []string {
	t.Helper()
	files := c.issue(t, name)
	return []string{"--attacher", attacher, "--certificate", files + ".crt", "--key", files + ".key", "--ca", filepath.Join(c.ca, "ca.crt")}
}

// freePort is an address of the loopback that nobody listens at.
func freePort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// unitsBefore is what systemd does to each process by its unit file.
func unitsBefore(t *testing.T) map[string][]string {
	t.Helper()
	before := make(map[string][]string)
	for _, part := range []string{"attacher", "image-mgmt", "snapshotter"} {
		before[part] = readUnit(t, "thaw-"+part+".service").before(t)
	}
	return before
}

// convert runs thaw image convert with a root and run directory that do not exist.
func (e *elsewhere) convert(ctx context.Context, t *testing.T, source, dest string, v variant, more ...string) (convert.Result, error) {
	t.Helper()
	none := filepath.Join(t.TempDir(), "none")
	args := append([]string{"image", "convert", source, dest, "--mode", v.mode, "--filesystem", v.filesystem, "--plain-http", "--json", "--quiet", "--root", none, "--run", none}, more...)
	var result convert.Result
	c := e.b.lab.Command(ctx, "thaw", args...)
	var stderr strings.Builder
	c.Stderr = &stderr
	out, err := c.Output()
	if err != nil {
		return result, fmt.Errorf("%w: %s", err, stderr.String())
	}
	if stderr.Len() > 0 {
		t.Errorf("the converter says %s", stderr.String())
	}
	return result, json.Unmarshal(out, &result)
}

// TestConvertElsewhere converts on a machine that is not the store's, and compares with
// what a conversion there gives.
func TestConvertElsewhere(t *testing.T) {
	b := start(t)
	e := newElsewhere(t, b)
	local := b.thaw(t)
	source := b.image(t, recipe.Small("a"))
	for _, v := range []variant{variants[0], variants[2]} {
		t.Run(v.String(), func(t *testing.T) {
			here, there := source+"-here-"+v.String(), source+"-there-"+v.String()
			far, err := e.convert(t.Context(), t, source, there, v, e.flags...)
			if err != nil {
				t.Fatal(err)
			}
			near, err := local.Convert(t.Context(), source, here, v.mode, v.filesystem)
			if err != nil {
				t.Fatal(err)
			}
			if fmt.Sprint(far.Images[0].Blocks()) != fmt.Sprint(near.Images[0].Blocks()) {
				t.Errorf("blocks %q, on the store's machine %q", far.Images[0].Blocks(), near.Images[0].Blocks())
			}
			// The soldier has what all blocks have.
			block := far.Images[0].Soldier
			a, b := hashLvol(t, filepath.Join(e.store.Run, "attacher.sock"), block), hashLvol(t, filepath.Join(local.Run, "thaw.sock"), block)
			// ext4 has times and random numbers in it; what it holds is compared by starts.
			if a != b && v.filesystem == "erofs" {
				t.Errorf("block %s is %s, converted on the store's machine %s", block, a, b)
			}
		})
	}
	t.Run("others", func(t *testing.T) {
		_, err := e.convert(t.Context(), t, source, source+"-never", variants[0], e.cluster.flags(t, "node-1", e.flags[1])...)
		if err == nil || !strings.Contains(err.Error(), "not on the list") {
			t.Errorf("a machine that is no converter: %v", err)
		}
	})
	t.Run("killed", func(t *testing.T) { testConvertElsewhereKilled(t, e, b.image(t, recipe.Small("b"))) })
}

// testConvertElsewhereKilled kills converters at moments spread over a conversion.
func testConvertElsewhereKilled(t *testing.T, e *elsewhere, source string) {
	v := variants[1]
	before := e.lvols(t)
	for i, after := range []time.Duration{60, 200, 450} {
		ctx, cancel := context.WithTimeout(t.Context(), after*time.Millisecond) // then SIGKILL
		_, err := e.convert(ctx, t, source, fmt.Sprintf("%s-killed%d", source, i), v, append(e.flags, "--virtual-size", "1GiB")...)
		late := ctx.Err() == nil
		cancel()
		if err == nil || late {
			t.Logf("conversion was done before %d ms: %v", after, err)
			break
		}
	}
	// Nothing of them is left: no work, no export, no process, no mount, no loop device.
	var left []string
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		left = nil
		for _, l := range e.lvols(t) {
			if strings.HasPrefix(l.GetName(), "work-") || l.GetOwner() != "" {
				left = append(left, l.GetName())
			}
		}
		for _, pid := range e.b.lab.Pids("image disks") {
			left = append(left, fmt.Sprint("process ", pid))
		}
		if len(left) == 0 {
			break
		}
	}
	if len(left) > 0 {
		t.Errorf("10 s after the last kill there is %q; before the first there were %d lvols", left, len(before))
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(mounts), "/sys/fs/fuse/connections/dev") {
		t.Error("a mount is left")
	}
	if _, err := e.convert(t.Context(), t, source, source+"-after", v, append(e.flags, "--virtual-size", "1GiB")...); err != nil {
		t.Errorf("a conversion after killed ones: %v", err)
	}
}

func (e *elsewhere) lvols(t *testing.T) []*attacherv1.Lvol {
	t.Helper()
	conn, err := rpc.Dial(filepath.Join(e.store.Run, "attacher.sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	r, err := attacherv1.NewAttacherClient(conn).ListLvols(t.Context(), &attacherv1.ListLvolsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	return r.GetLvols()
}

// hashLvol hashes what a block holds, through an export of the attacher at a socket.
func hashLvol(t *testing.T, socket, lvol string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	conn, err := rpc.Dial(socket)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	c := attacherv1.NewAttacherClient(conn)
	owner := fmt.Sprintf("hash-%d", os.Getpid())
	hold, err := c.Hold(ctx, &attacherv1.HoldRequest{Owner: owner})
	if err == nil {
		_, err = hold.Recv()
	}
	if err != nil {
		t.Fatal(err)
	}
	x, err := c.Export(ctx, &attacherv1.ExportRequest{Lvol: lvol, Owner: owner, ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(x.GetPath())
	if err != nil {
		t.Fatal(err)
	}
	h, buf := sha256.New(), make([]byte, 64<<10)
	zeros := make([]byte, len(buf))
	for offset := int64(0); offset < x.GetSizeBytes(); {
		m, err := attacherv1.NewNodeClient(conn).GetBlockMap(ctx, &attacherv1.GetBlockMapRequest{Block: lvol, OffsetBytes: offset})
		if err != nil {
			t.Fatal(err)
		}
		for _, run := range m.GetRuns() {
			for end := offset + run.GetLengthBytes(); offset < end; offset += int64(len(buf)) {
				if run.GetOwner() == 0 {
					offset = end
					break
				}
				n, err := f.ReadAt(buf[:min(int64(len(buf)), end-offset)], offset)
				if err != nil {
					t.Fatal(err)
				}
				if !bytes.Equal(buf[:n], zeros[:n]) {
					fmt.Fprintln(h, offset)
					h.Write(buf[:n])
				}
			}
		}
	}
	f.Close()
	if _, err := c.Unexport(ctx, &attacherv1.UnexportRequest{Lvol: lvol, Owner: owner}); err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%x", h.Sum(nil))
}
