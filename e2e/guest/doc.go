// Package guest boots a virtual machine with Debian's kernel 6.12 under QEMU, without
// KVM, for what the running kernel lacks: nvme-tcp, nvme-rdma over rdma_rxe, nvmet, nbd,
// ublk, device-mapper.
//
// A test asks for one and runs scripts in it:
//
//	g := guest.New(t, guest.Options{
//		Modules:   []string{"nvme-tcp"},
//		Files:     map[string]string{"thaw": "/path/to/bin/thaw"}, // in the guest: /host/thaw
//		ScratchMB: 4096,                                           // in the guest: /scratch, ext4
//		Forward:   []int{4420},                                    // this machine reaches it at g.Address(4420)
//	})
//	out := g.Must(t, "nvme connect -t tcp -a 10.0.2.2 -s 4420 -n "+nqn) // fails the test unless it exits with 0
//	out, code, err := g.Run(ctx, "nvme list")                           // or look at the status
//
// and, for something that goes on meanwhile:
//
//	p, err := g.Start(ctx, "fio ...", nil)
//	...
//	code, err := p.Wait(ctx)
//
// New skips the test unless THAW_VM=1, which `make test-vm` sets; on failure it logs the
// end of the guest's console. Start without a test is for programs; `go run
// ./e2e/guest/try 'script'` runs a script in a guest of its own.
//
// # What the guest is
//
// One processor, 1 GB, boots in 5 to 10 s. The root file system has what image.go lists
// (nvme-cli, fio, nbd-client, containerd, runc, e2fsprogs, erofs-utils, rdma, busybox for the
// rest); it is an EROFS under a tmpfs, so everything can be written and nothing lasts.
// /scratch is an ext4 on a disk, for much data and for files that the kernel mounts.
// Scripts run in bash as root without `set -e`. Modules that image.go lists can be loaded
// with modprobe; no udev runs. agent/guest.sh has shell functions for scripts to call, such
// as await and nvme_device. cgroup v2 is at /sys/fs/cgroup, configfs not mounted.
//
// The network is QEMU's user networking: the guest is 10.0.2.15; what listens on this
// machine's 127.0.0.1 is at 10.0.2.2; this machine reaches only forwarded ports, which the guest
// must serve on 10.0.2.15 or all addresses. It carries 60 to 180 Mbit/s. Programs
// run 10 to 100 times slower than here, so give deadlines accordingly and never decide by
// the clock.
//
// One guest runs at a time on a machine: Start waits for the other. It ends with the process
// that started it, however that ends.
//
// The package must not know Thaw: it is a machine like any other.
package guest
