// Command demo shows on this machine what Thaw is for: the same image started cold by
// containerd's overlayfs and by Thaw, in both image modes, with the registry and the
// store of images each behind a 1 Gbit link, and how long each step took.
//
// It runs everything in folders of its own and takes it away at the end.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"text/tabwriter"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"github.com/thaw-project/thaw/e2e/lab"
	"github.com/thaw-project/thaw/e2e/launch"
	"github.com/thaw-project/thaw/e2e/recipe"
)

// Row is one cold start in out/demo.json.
type Row struct {
	Runtime    string  `json:"runtime"`    // overlayfs (containerd's) or thaw
	Mode       string  `json:"mode"`       // of the image; empty for containerd's overlayfs
	Filesystem string  `json:"filesystem"` // in the blocks; empty for containerd's overlayfs
	PullS      float64 `json:"pull_s"`
	CreateS    float64 `json:"create_s"`
	ReadyS     float64 `json:"ready_s"`
	TotalS     float64 `json:"total_s"`
	LinkBytes  int64   `json:"link_bytes"`
}

type variant struct{ mode, filesystem string }

type options struct {
	image string
	rate  string
	out   string
	cache string
	all   bool
	keep  bool
}

func main() {
	var o options
	flag.StringVar(&o.image, "image", os.Getenv("IMAGE"), "reference of an image to use instead of building one; it must answer HTTP on $PORT")
	flag.StringVar(&o.rate, "rate", "1gbit", "rate of the links to registry and store, as tc spells it")
	flag.StringVar(&o.out, "out", "out/demo.json", "file for the figures")
	flag.StringVar(&o.cache, "cache", "out/cache", "folder for built image layers")
	flag.BoolVar(&o.all, "all", false, "all four combinations of mode and file system, not only each mode's default")
	flag.BoolVar(&o.keep, "wait", false, "wait for Ctrl-C before cleaning up, to look around")
	flag.Parse()

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, o); err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, o options) (err error) {
	l, err := lab.New()
	if err != nil {
		return err
	}
	defer func() {
		say("Cleaning up")
		err = errors.Join(err, l.Close())
	}()
	d := demo{lab: l, o: o}
	if err := d.prepare(ctx); err != nil {
		return err
	}
	rows, err := d.measure(ctx)
	if err != nil {
		return err
	}
	d.table(rows)
	if err := writeRows(o.out, rows); err != nil {
		return err
	}
	say("Figures are in %s", o.out)
	if o.keep {
		say("Waiting for Ctrl-C; everything is in %s", l.Dir)
		<-ctx.Done()
	}
	return nil
}

func say(format string, args ...any) { fmt.Printf("\n==> "+format+"\n", args...) }

type demo struct {
	lab      *lab.Lab
	o        options
	link     *lab.Link
	registry *lab.Registry
	port     *lab.Port // the node's place in the store's network
	store    *lab.Thaw
	thaw     *lab.Thaw // the node
	source   string
	variants []variant
	number   int
}

func (d *demo) prepare(ctx context.Context) error {
	say("Building the image (layers are kept in %s)", d.o.cache)
	image, err := d.image(ctx)
	if err != nil {
		return err
	}
	compressed, err := recipe.Compressed(image)
	if err != nil {
		return err
	}
	unpacked, err := recipe.Unpacked(image)
	if err != nil {
		return err
	}
	layers, err := image.Layers()
	if err != nil {
		return err
	}
	fmt.Printf("%d layers, %.0f MB compressed, %.0f MB unpacked\n", len(layers), float64(compressed)/1e6, float64(unpacked)/1e6)

	say("Starting a registry behind a link of %s", d.o.rate)
	if d.link, err = d.lab.NewLink(d.o.rate); err != nil {
		return err
	}
	if d.registry, err = d.lab.StartRegistry(ctx, lab.RegistryOptions{Behind: d.link}); err != nil {
		return err
	}
	if err := d.startThaw(ctx); err != nil {
		return err
	}
	d.source = d.registry.Ref("demo/app", "1")
	if err := recipe.Push(ctx, image, d.source); err != nil {
		return err
	}
	d.variants = []variant{{"overlayfs", ""}, {"overlaybd", ""}}
	if d.o.all {
		d.variants = []variant{{"overlayfs", "erofs"}, {"overlayfs", "ext4"}, {"overlaybd", "ext4"}, {"overlaybd", "erofs"}}
	}
	for i, v := range d.variants {
		converted, err := d.store.Convert(ctx, d.source, d.reference(v), v.mode, v.filesystem)
		if err != nil {
			return err
		}
		d.variants[i].filesystem = string(converted.Images[0].Filesystem)
		// The reference was made of the file system asked for; keep it.
		say("Converted to mode %s on %s in %.1f s: %d blocks, %.0f MB in the store", v.mode, d.variants[i].filesystem,
			converted.Took.Seconds(), len(converted.Images[0].Blocks()), float64(converted.WrittenBytes())/1e6)
		if d.variants[i].filesystem != v.filesystem {
			if err := retag(ctx, d.reference(v), d.reference(d.variants[i])); err != nil {
				return err
			}
		}
	}
	d.print(d.store.Command(ctx, "lvol", "list"), "")
	return nil
}

// startThaw starts a store and a node in networks of their own, joined by a link.
func (d *demo) startThaw(ctx context.Context) error {
	say("Starting a store, and a node behind a link of %s to it", d.o.rate)
	star, err := d.lab.NewStar()
	if err != nil {
		return err
	}
	if d.port, err = star.Add(d.o.rate); err != nil {
		return err
	}
	ca, err := d.lab.Path("certificates", "ca")
	if err != nil {
		return err
	}
	d.print(d.lab.Command(ctx, "thaw", "certificate", "authority", "--out", ca), "")
	dir := filepath.Dir(ca)
	d.print(d.lab.Command(ctx, "thaw", "certificate", "issue", "--ca", ca, "--node", "store", "--address", star.Host, "--out", dir), "")
	d.print(d.lab.Command(ctx, "thaw", "certificate", "issue", "--ca", ca, "--node", "node", "--out", dir), "")
	if d.store, err = d.lab.StartThawWith(ctx, lab.ThawOptions{
		StoreOnly: true, Network: star.Enter(), Config: fmt.Sprintf(storeConfig, star.Host, star.Host, dir, dir, dir),
	}); err != nil {
		return err
	}
	d.thaw, err = d.lab.StartThawWith(ctx, lab.ThawOptions{
		NodeOnly: true, Network: d.port.Enter(), Config: fmt.Sprintf(nodeConfig, star.Host, dir, dir, dir),
	})
	return err
}

// The node has its cache, as by default. It finds nothing in it: no two rows share blocks.
const (
	storeConfig = `roles = ["store"]
target = "demo-store"
[export]
nvme_tcp = ["%s:4420"]
attacher = "%s:7443"
certificate = "%s/store.crt"
key = "%s/store.key"
client_ca = "%s/ca.crt"
`
	nodeConfig = `roles = ["node"]
[[remote]]
name = "demo-store"
attacher = "%s:7443"
certificate = "%s/node.crt"
key = "%s/node.key"
ca = "%s/ca.crt"
`
)

// linkBytes is what came over both links to where containers run.
func (d *demo) linkBytes() (int64, error) {
	fromRegistry, err := d.link.Bytes()
	if err != nil {
		return 0, err
	}
	fromStore, _, err := d.port.Bytes()
	return fromRegistry + fromStore, err
}

func (d *demo) reference(v variant) string {
	tag := "1-" + v.mode
	if v.filesystem != "" {
		tag += "-" + v.filesystem
	}
	return d.registry.Ref("demo/app", tag)
}

func retag(ctx context.Context, from, to string) error {
	source, err := name.ParseReference(from, name.Insecure)
	if err != nil {
		return err
	}
	tag, err := name.NewTag(to, name.Insecure)
	if err != nil {
		return err
	}
	descriptor, err := remote.Get(source, remote.WithContext(ctx))
	if err != nil {
		return err
	}
	return remote.Tag(tag, descriptor, remote.WithContext(ctx))
}

func (d *demo) image(ctx context.Context) (v1.Image, error) {
	if d.o.image == "" {
		b := recipe.Builder{Cache: filepath.Join(d.o.cache, "images"), Log: os.Stdout}
		return b.Build(ctx, recipe.Web())
	}
	ref, err := name.ParseReference(d.o.image)
	if err != nil {
		return nil, err
	}
	image, err := remote.Image(ref, remote.WithContext(ctx))
	if err != nil {
		return nil, fmt.Errorf("fetch %s: %w", d.o.image, err)
	}
	return image, nil
}

func (d *demo) measure(ctx context.Context) ([]Row, error) {
	say("Starting the image cold: containerd's metadata, its images and the page cache are empty each time")
	var rows []Row
	row, err := d.coldStart(ctx, "overlayfs", d.source, variant{})
	if err != nil {
		return nil, err
	}
	rows = append(rows, row)
	for _, v := range d.variants {
		row, err := d.coldStart(ctx, "thaw", d.reference(v), v)
		if err != nil {
			return nil, err
		}
		rows = append(rows, row)
	}
	return rows, nil
}

func (d *demo) coldStart(ctx context.Context, snapshotter, ref string, v variant) (row Row, err error) {
	row = Row{Runtime: snapshotter, Mode: v.mode, Filesystem: v.filesystem}
	o := lab.ContainerdOptions{}
	if snapshotter == "thaw" {
		o.Thaw = d.thaw
	}
	c, err := d.lab.StartContainerd(ctx, o)
	if err != nil {
		return row, err
	}
	defer func() { err = errors.Join(err, c.Stop()) }()
	node := &launch.Node{Lab: d.lab, Containerd: c, Snapshotter: snapshotter}
	if err := lab.DropCaches(); err != nil {
		return row, fmt.Errorf("drop the page cache: %w", err)
	}
	before, err := d.linkBytes()
	if err != nil {
		return row, err
	}
	d.number++
	id := fmt.Sprintf("demo%d", d.number)
	container, timing, err := node.Cold(ctx, id, ref)
	if container != nil {
		defer func() {
			// Also after Ctrl-C.
			ctx := context.WithoutCancel(ctx)
			err = errors.Join(err, container.Delete(ctx), node.RemoveImage(ctx, ref))
			if snapshotter == "thaw" {
				err = errors.Join(err, d.thaw.WaitNoSnapshots(ctx))
			}
		}()
	}
	if err != nil {
		return row, err
	}
	after, err := d.linkBytes()
	if err != nil {
		return row, err
	}
	row.PullS, row.CreateS, row.ReadyS = timing.Pull.Seconds(), timing.Create.Seconds(), timing.Ready.Seconds()
	row.TotalS, row.LinkBytes = timing.Total().Seconds(), after-before
	fmt.Printf("\n%s %s %s: ready in %.2f s\n", snapshotter, v.mode, v.filesystem, row.TotalS)
	if snapshotter == "thaw" {
		d.show(ctx, container)
	}
	return row, nil
}

// show prints where the container's root file system comes from.
func (d *demo) show(ctx context.Context, c *launch.Container) {
	d.print(d.lab.Command(ctx, "findmnt", "--noheadings", "--output", "FSTYPE,SOURCE,OPTIONS", "--mountpoint", c.Rootfs()), "")
	d.print(d.lab.Command(ctx, "findmnt", "--list", "--noheadings", "--notruncate", "--output", "TARGET,FSTYPE,SOURCE"), filepath.Dir(d.thaw.Root))
}

// print shows a command and those lines of its output that contain match, with the
// lab's folder as $DIR.
func (d *demo) print(cmd *exec.Cmd, match string) {
	short := func(s string) string { return strings.ReplaceAll(s, d.lab.Dir, "$DIR") }
	command := strings.Join(cmd.Args, " ")
	if match != "" {
		command += " | grep " + match
	}
	fmt.Printf("$ %s\n", short(command))
	out, err := cmd.CombinedOutput()
	for line := range strings.Lines(string(out)) {
		if strings.Contains(line, match) {
			fmt.Print(short(line))
		}
	}
	if err != nil {
		fmt.Println(err)
	}
}

func (d *demo) table(rows []Row) {
	say("Cold start, registry and store behind %s", d.o.rate)
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(w, "runtime\tmode\tfile system\tpull s\tcreate s\tready s\ttotal s\tof overlayfs\tlink MB\t")
	for _, r := range rows {
		fmt.Fprintf(w, "%s\t%s\t%s\t%.3f\t%.3f\t%.3f\t%.3f\t%.1f%%\t%.2f\t\n", r.Runtime, dash(r.Mode), dash(r.Filesystem),
			r.PullS, r.CreateS, r.ReadyS, r.TotalS, 100*r.TotalS/rows[0].TotalS, float64(r.LinkBytes)/1e6)
	}
	w.Flush()
	fmt.Print(`
"pull" is the pull with unpacking, "create" the container and its mounts, "ready" from
start to the first HTTP answer, "link" what came over the links, headers included: from
the registry, and with Thaw from the store, by NVMe/TCP.

Store and node are processes in network namespaces of their own on this one machine. The
page cache is dropped before each start, and no row finds anything of its image in the
node's own cache. The image was
converted once, beforehand; that time is printed above and is not in the table.
`)
}

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func writeRows(path string, rows []Row) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	data, err := json.MarshalIndent(rows, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(path, append(data, '\n'), 0o644)
}
