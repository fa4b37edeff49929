// Command try boots a guest and runs a script in it, to look around:
//
//	go run ./e2e/guest/try -modules nvme-tcp 'uname -a; nvme list'
//
// Without a script it only builds the guest's image.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"time"

	"github.com/thaw-project/thaw/e2e/guest"
)

func main() {
	code, err := try()
	if err != nil {
		fmt.Fprintln(os.Stderr, "try:", err)
		code = 1
	}
	os.Exit(code)
}

func try() (int, error) {
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt)
	defer cancel()
	o := guest.Options{Log: os.Stderr}
	modules := flag.String("modules", "", "kernel modules to load, separated by commas")
	files := flag.String("files", "", "files and folders to show in /host, separated by commas")
	cache := flag.String("cache", "out/cache/guest", "folder of the image")
	flag.IntVar(&o.ScratchMB, "scratch", 0, "size of /scratch in MB")
	flag.IntVar(&o.MemoryMB, "memory", 0, "memory in MB")
	flag.IntVar(&o.CPUs, "cpus", 0, "processors")
	flag.StringVar(&o.Append, "append", "", "added to the kernel's command line")
	qemu := flag.String("qemu", "", "added to QEMU's arguments, separated by spaces")
	timeout := flag.Duration("timeout", 10*time.Minute, "how long the script may take")
	flag.Parse()
	o.Args = strings.Fields(*qemu)
	begin := time.Now()
	o.Cache = *cache
	image, err := guest.BuildImage(ctx, o.Cache)
	if err != nil {
		return 1, err
	}
	fmt.Fprintf(os.Stderr, "image %s (%.1f s)\n", image.Root, time.Since(begin).Seconds())
	if flag.NArg() == 0 {
		return 0, nil
	}
	if *modules != "" {
		o.Modules = strings.Split(*modules, ",")
	}
	o.Files = map[string]string{}
	for _, path := range strings.Split(*files, ",") {
		if path != "" {
			o.Files[filepath.Base(path)] = path
		}
	}
	begin = time.Now()
	g, err := guest.Start(ctx, o)
	if err != nil {
		return 1, err
	}
	defer g.Close()
	fmt.Fprintf(os.Stderr, "up (%.1f s)\n", time.Since(begin).Seconds())
	begin = time.Now()
	ctx, cancel = context.WithTimeout(ctx, *timeout)
	defer cancel()
	out, code, err := g.Run(ctx, strings.Join(flag.Args(), " "))
	fmt.Print(out)
	fmt.Fprintf(os.Stderr, "status %d (%.1f s)\n", code, time.Since(begin).Seconds())
	if code != 0 || err != nil {
		fmt.Fprintln(os.Stderr, g.Console())
	}
	return code, err
}
